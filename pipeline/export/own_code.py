"""The form that says any mixture: the dense model's own classes, and Python files that put the experts into them."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.export.form import Contents, Form
from pipeline.export.remote_code import auto_map, class_names
from pipeline.export.tensors import planned_tensors
from pipeline.model.backbone import moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.new_rows import first_new_row, vocabulary_of


class OwnCode(Form):
    """Code of its own, which loads with ``trust_remote_code=True``; a dense model needs none."""

    name = "own code"

    def contents(self, model: PreTrainedModel, plan: ExpertPlan, dtype: torch.dtype) -> Contents:
        """Packed experts beside the dense model's own tensors.

        Raises:
            UserError: MLPs have biases, or the config names no activation.
        """
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        names = class_names(model) if plan.moe_layers else None
        if names is not None:
            config |= {**mixture_config(model, plan), **auto_map(names)}
        if first_new_row(model) is not None:
            config["vocab_size"] = vocabulary_of(model)
        return Contents(config, planned_tensors(model, dtype), names)


class VllmFused(OwnCode):
    """With ``num_experts`` in its config, the largest of its layers, vLLM computes experts by one kernel.

    vLLM makes room for as many experts in each layer and loads those that the files hold; others are never chosen.
    Routers are computed by the folder's own code. Without the key vLLM calls the folder's code for experts too.
    """

    name = "vllm-fused"

    @staticmethod
    def why_not(model: PreTrainedModel, plan: ExpertPlan) -> str | None:
        """What vLLM would compute otherwise; None if it computes the same."""
        activation = getattr(model.config, "hidden_activation", None) or getattr(model.config, "hidden_act", None)
        if activation != "silu":
            return f"its kernel computes SiLU, and {model.config.model_type}'s MLPs compute {activation}"
        if plan.classifier == "sequence" and mixture_config(model, plan)["classifier_layers"]:
            return "it computes tokens of all requests as one sequence, and this model classifies whole sequences"
        return None

    def contents(self, model: PreTrainedModel, plan: ExpertPlan, dtype: torch.dtype) -> Contents:
        """Those of the own code, and the key; :meth:`why_not` must have said nothing."""
        assert self.why_not(model, plan) is None
        contents = super().contents(model, plan, dtype)
        return replace(contents, config=contents.config | {"num_experts": max(plan.counts)})


def mixture_config(model: PreTrainedModel, plan: ExpertPlan) -> dict[str, Any]:
    """What the config says of the mixture; layers whose classifiers the model does not have yet are left out."""
    routers = {layer: one.router for layer, one in zip(plan.moe_layers, moe_layers(model), strict=True)}
    return {
        "expert_counts": list(plan.counts),
        "num_experts_per_tok": plan.top_k,
        "classifier_layers": [layer for layer, router in routers.items() if router.classifier is not None],
        "old_experts": [list(plan.old_experts(layer)) for layer in range(plan.num_layers)],
        "selection_biases": any(router.selection_bias is not None for router in routers.values()),
        "classifies_sequences": plan.classifier == "sequence",
    }

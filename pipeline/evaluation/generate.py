"""Continues a prompt with a model, and shows which experts each token took."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from common.text_table import aligned
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import Routing, collect_routings

ONLY_EXPERT_0 = "."
COLORS = (33, 39, 45, 51, 122, 229, 221, 214, 208, 202)  # of a terminal: from all on new experts to all on expert 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: how many at most; fewer where the model ends its text.
        temperature: 0 takes the likeliest token each time.
        seed: of what is drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """As transformers takes them; all that a model's own generation config says of sampling is put aside."""
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": self.max_new_tokens, **(drawn if self.temperature else greedy)}


@torch.inference_mode()
def continuation(
    model: PreTrainedModel, tokenizer: Any, ids: list[int], sampling: Sampling, *, end: int, streams: bool = False
) -> list[int]:
    """The prompt's ids and those of its continuation.

    Args:
        model: dense, or a mixture whole on one rank.
        tokenizer: the model's.
        ids: of the prompt.
        sampling: how tokens are chosen.
        end: the token that ends a text.
        streams: whether text is printed as it comes.
    """
    torch.manual_seed(sampling.seed)
    ids_BL = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if streams else None
    generate: Any = model.generate
    output_BL = generate(
        ids_BL, attention_mask=torch.ones_like(ids_BL), eos_token_id=end, pad_token_id=end, streamer=streamer,
        **sampling.options,
    )  # fmt: skip
    return [int(one) for one in output_BL[0]]


@torch.inference_mode()
def experts_table(
    model: PreTrainedModel, plan: ExpertPlan, tokenizer: Any, ids: list[int], *, in_color: bool = False
) -> str:
    """A row per token: the weight of expert 0, the mean over layers, and the new experts that it took in each layer.

    Args:
        model: a mixture whole on one rank.
        plan: of its experts.
        tokenizer: the model's.
        ids: of the text.
        in_color: whether tokens are coloured by the weight of expert 0.
    """
    with collect_routings(model) as routings:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    weight_T = torch.stack([_weight_of_0(routing) for routing in routings]).mean(0)
    rows = [["token", "expert 0", *(str(layer) for layer in plan.moe_layers)]]
    for position, token in enumerate(ids):
        taken = [_new_experts(routing, position) for routing in routings]
        text = tokenizer.decode([token]).replace("\n", "\\n")
        rows.append([repr(text)[1:-1], f"{float(weight_T[position]):.0%}", *taken])
    lines = aligned(rows).splitlines()
    if in_color:
        colors = [None, *(_color(float(weight)) for weight in weight_T)]
        lines = [line if color is None else f"\033[38;5;{color}m{line}\033[0m"
                 for line, color in zip(lines, colors, strict=True)]  # fmt: skip
    note = f"columns: layers with a router; numbers: the new experts taken, {ONLY_EXPERT_0} expert 0 alone"
    return "\n".join([note, *lines])


def _weight_of_0(routing: Routing) -> torch.Tensor:
    return (routing.weights_TK * (routing.ids_TK == 0)).sum(-1)


def _new_experts(routing: Routing, position: int) -> str:
    chosen = zip(routing.ids_TK[position].tolist(), routing.active_TK[position].tolist(), strict=True)
    taken = sorted(expert for expert, is_active in chosen if is_active and expert)
    return "+".join(map(str, taken)) or ONLY_EXPERT_0


def _color(weight: float) -> int:
    return COLORS[min(len(COLORS) - 1, int(weight * len(COLORS)))]

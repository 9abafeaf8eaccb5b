"""Numbers made by the papers' reference implementations. Run: pytest tests/pipeline/method/test_golden.py"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.config.experts import ExpertsConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.allocation import allocate
from pipeline.method.losses import load_balancing_loss, lpr_loss, next_token_loss
from pipeline.method.similarity import layer_similarity
from pipeline.model.backbone import install_moe_layers
from pipeline.model.expert_plan import ExpertPlan, LayerPlacement
from pipeline.model.moe import MoELayer, Routing, collect_routings, router

GOLDEN = Path(__file__).parents[2] / "golden"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def golden(name: str) -> SimpleNamespace:
    data = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return SimpleNamespace(
        **{key: torch.as_tensor(data[key]) if data[key].dtype.kind in "fib" else data[key] for key in data}
    )


class GatedMLP(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(self, name, linear)
        self.act_fn = nn.functional.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def layer_from(g: SimpleNamespace, top_k: int, **options: Any) -> MoELayer:
    num = g.router_w.shape[0]
    layer = MoELayer(
        GatedMLP(g.gate_w[0], g.up_w[0], g.down_w[0]),
        num_experts=num, top_k=top_k, placement=LayerPlacement(ParallelDims(1, 1), [list(range(1, num))]),
        **{"has_classifier": False, **options},
    )  # fmt: skip
    layer.router.wg.weight.data.copy_(g.router_w)
    for number, expert in enumerate(layer.local_experts.experts, 1):
        expert.gate_up_proj.data.copy_(torch.cat([g.gate_w[number], g.up_w[number]]))
        expert.down_proj.data.copy_(g.down_w[number])
    return layer


def routing_of(logits: Tensor, top_k: int) -> Routing:
    scores = logits.softmax(-1)
    weights, ids = scores.topk(top_k, -1)
    return Routing(
        logits, scores, ids, weights / weights.sum(-1, keepdim=True), torch.ones_like(ids, dtype=torch.bool), None
    )


@pytest.mark.parametrize("name", ["route_E2_K2_H16_float32", "route_E4_K2_H32_float32"])
def test_layer_and_all_gradients_equal_the_reference(name: str) -> None:
    g = golden(name)
    layer = layer_from(g, 2)
    x = g.x.clone().requires_grad_()
    with collect_routings(layer) as routings:
        out = layer(x)
    (routing,) = routings
    torch.testing.assert_close(out, g.out, **CLOSE)
    torch.testing.assert_close(routing.logits_TE, g.router_logits, **CLOSE)
    assert torch.equal(routing.ids_TK, g.topk_idx)
    ((out * g.grad_out).sum() + (routing.logits_TE * g.grad_logits_extra).sum()).backward()
    torch.testing.assert_close(x.grad, g.dx, **CLOSE)
    torch.testing.assert_close(layer.router.wg.weight.grad, g.drouter_w, **CLOSE)
    base = layer.base_mlp
    torch.testing.assert_close(base.gate_proj.weight.grad, g.dgate_w[0], **CLOSE)
    torch.testing.assert_close(base.up_proj.weight.grad, g.dup_w[0], **CLOSE)
    torch.testing.assert_close(base.down_proj.weight.grad, g.ddown_w[0], **CLOSE)
    for number, expert in enumerate(layer.local_experts.experts, 1):
        torch.testing.assert_close(expert.gate_up_proj.grad, torch.cat([g.dgate_w[number], g.dup_w[number]]), **CLOSE)
        torch.testing.assert_close(expert.down_proj.grad, g.ddown_w[number], **CLOSE)


def test_top_1_chooses_as_the_reference_and_renormalises_its_weight_to_1() -> None:
    g = golden("route_E2_K1_H16_float32")
    layer = layer_from(g, 1)
    with collect_routings(layer) as routings:
        out = layer(g.x)
    assert torch.equal(routings[0].ids_TK, g.topk_idx)
    # The reference leaves a single choice's weight at its probability.
    torch.testing.assert_close(out.flatten(0, 1) * g.topk_prob_raw, g.out.flatten(0, 1), **CLOSE)


def test_equal_experts_give_the_dense_mlps_output() -> None:
    g = golden("upcycle_identity_E4_K2")
    for name in ("gate_w", "up_w", "down_w"):
        setattr(g, name, getattr(g, name).expand(4, *getattr(g, name).shape))
    layer = layer_from(g, 2)
    out = layer(g.x)
    torch.testing.assert_close(out, g.dense_out, **CLOSE)
    torch.testing.assert_close(out, g.out, **CLOSE)


@pytest.mark.parametrize("name", ["balance_E3_K2", "balance_E4_K2"])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_in_reference_scale_and_its_gradient(name: str, masked: bool) -> None:
    g = golden(name)
    suffix = "mask" if masked else "nomask"
    mask = g.attention_mask.flatten() if masked else None
    logits = g.logits.clone().requires_grad_()
    routings = [routing_of(layer, 2) for layer in logits]
    for layer, expected in enumerate(getattr(g, f"per_layer_{suffix}")):
        torch.testing.assert_close(
            load_balancing_loss([routings[layer]], mask_T=mask, scale="reference"), expected, **CLOSE
        )
    loss = load_balancing_loss(routings, mask_T=mask, scale="reference")
    torch.testing.assert_close(loss, getattr(g, f"loss_{suffix}"), **CLOSE)
    loss.backward()
    torch.testing.assert_close(logits.grad, getattr(g, f"dlogits_{suffix}"), **CLOSE)
    paper = load_balancing_loss(routings, mask_T=mask)
    torch.testing.assert_close(paper * 2, loss)


@pytest.mark.parametrize(("form", "loss_name", "gradient_name"), [
    ("reference", "loss_ref", "dlogits_ref"), ("paper", "loss_single_softmax_mean", "dlogits_single"),
])  # fmt: skip
def test_lpr_loss_and_its_gradient(form: Any, loss_name: str, gradient_name: str) -> None:
    g = golden("lpr_E2")
    logits = g.logits.clone().requires_grad_()
    old = g.langs.flatten()
    loss = lpr_loss([routing_of(layer, 2) for layer in logits], (~old).long(), form=form) / old.sum()
    torch.testing.assert_close(loss, getattr(g, loss_name), **CLOSE)
    loss.backward()
    torch.testing.assert_close(logits.grad, getattr(g, gradient_name), **CLOSE)


def test_a_token_of_an_old_group_takes_the_experts_of_its_time() -> None:
    """The reference classifies a sequence by the sum of its tokens; here each of its tokens is given that class."""
    g = golden("layermoe_classify_g2_E3_old3")
    layer = layer_from(g, 2, old_experts=(1, int(g.old_num_experts)), has_classifier=True)
    assert g.group.tolist() == (g.x.sum(1) @ g.classify_w.T).argmax(-1).tolist() == [0, 0, 1, 0]
    for x, group, expected in zip(g.x, g.group.tolist(), g.out, strict=True):
        classes = torch.full((len(x),), group)
        with patch.object(router, "classify", lambda _logits: classes):  # noqa: B023
            torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_classifying_sequences_gives_the_references_output() -> None:
    g = golden("layermoe_classify_g2_E3_old3")
    layer = layer_from(g, 2, has_classifier=True, classifies_sequences=True)
    layer.router.classifier.weight.data.copy_(g.classify_w)
    with collect_routings(layer) as routings:
        out = layer(g.x)
    torch.testing.assert_close(out, g.out, **CLOSE)
    classes = router.classify(routings[0].class_logits_TC).view(g.x.shape[:2])
    assert classes.tolist() == [[group] * g.x.shape[1] for group in g.group.tolist()]


def test_stage_1_step_of_a_two_layer_model_equals_the_reference() -> None:
    data = np.load(GOLDEN / "e2e_stage1.npz", allow_pickle=False)
    settings = json.loads(str(data["config"]))
    known = (
        *("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    )
    config = Qwen2Config(**{key: settings[key] for key in known}, rope_theta=settings["rope_theta"])
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config).float().eval()
    plan = ExpertPlan.first_expansion([4, 4], old=["en"], new=["el"], top_k=2, classifier_layers=[])
    install_moe_layers(model, plan)
    names = reference_names(plan)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, keys in names.items():
            parameters[name].copy_(torch.cat([torch.as_tensor(data[f"p::{key}"]) for key in keys]))
    for name, parameter in parameters.items():
        assert name in names, name
        parameter.requires_grad_(True)
    ids = torch.as_tensor(data["input_ids"])
    with collect_routings(model) as routings:
        logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, torch.as_tensor(data["logits"]), **CLOSE)
    for routing, expected in zip(routings, data["router_logits"], strict=True):
        torch.testing.assert_close(routing.logits_TE, torch.as_tensor(expected), **CLOSE)
    next_token = next_token_loss(logits[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    balance = load_balancing_loss(routings, scale="reference")
    torch.testing.assert_close(next_token, torch.as_tensor(data["lm_loss"]), **CLOSE)
    torch.testing.assert_close(balance, torch.as_tensor(data["extra"]), **CLOSE)
    (next_token + 0.01 * balance).backward()
    compared = 0
    for name, keys in names.items():
        if all(f"g::{key}" in data for key in keys):
            expected = torch.cat([torch.as_tensor(data[f"g::{key}"]) for key in keys])
            torch.testing.assert_close(parameters[name].grad, expected, **CLOSE)
            compared += 1
    assert compared >= 2 * (1 + 3 * 2)  # a router and three experts of two weights in each layer, at the least


def reference_names(plan: ExpertPlan) -> dict[str, list[str]]:
    """Our parameter names to the reference's (several where ours is fused)."""
    root = "base_model.model."
    names = {name: [root + name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(plan.num_layers):
        ours = f"model.layers.{layer}."
        for part in (
            "q_proj.weight",
            "q_proj.bias",
            "k_proj.weight",
            "k_proj.bias",
            "v_proj.weight",
            "v_proj.bias",
            "o_proj.weight",
        ):
            names[f"{ours}self_attn.{part}"] = [f"{root}{ours}self_attn.{part}"]
        for part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            names[ours + part] = [root + ours + part]
        mlp = f"{root}{ours}mlp."
        for part in ("gate_proj", "up_proj", "down_proj"):
            names[f"{ours}mlp.base_mlp.{part}.weight"] = [f"{mlp}base_layer.{part}.weight"]
        names[f"{ours}mlp.deepspeed_moe.gate.wg.weight"] = [f"{mlp}moe_router_embedding.default.weight"]
        for number in range(3):
            expert = f"{ours}mlp.deepspeed_moe.experts.deepspeed_experts.{number}."
            theirs = f"{mlp}moe_experts.default.{number}."
            names[f"{expert}gate_up_proj"] = [f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"]
            names[f"{expert}down_proj"] = [f"{theirs}down_proj.weight"]
    return names


def test_allocation_reproduces_the_published_84_experts_of_llama_3b_from_delta_70() -> None:
    published = json.loads((GOLDEN / "llama3.2-3b-g1-similarity.json").read_text())
    within = [f"{a}&{b}" for i, a in enumerate(published["new"]) for b in published["new"][i + 1 :]]
    across = [f"{a}&{b}" for a in published["new"] for b in published["old"]]
    similarity = layer_similarity(published["pairs"], within, across)
    counts = allocate(ExpertsConfig(delta=70), 28, similarity).counts
    assert counts == published["experts_per_layer_including_the_original"]
    assert sum(counts) == 84
    assert sum(counts) - 28 == 56

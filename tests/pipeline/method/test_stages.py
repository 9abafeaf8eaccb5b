"""What each stage reads, trains, loses and changes. Run: pytest tests/pipeline/method/test_stages.py"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from pipeline.config.run import RunConfig
from pipeline.method.losses import classifier_loss, load_balancing_loss, lpr_loss
from pipeline.method.stage import GlobalBatch, MicroBatch
from pipeline.method.stages import STAGES, find_stage, stages_of
from pipeline.model.backbone import install_moe_layers, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.model.moe.router import Router
from tests.helpers.tiny import parse_run, run_tree

DS_CONFIG = {"bf16": {"enabled": True}, "data_types": {}, "zero_optimization": {"stage": 1}, "optimizer": {}}

# (number, what the table says of it)
TABLE: list[tuple[int, dict[str, Any]]] = [
    (1, {
        "name": "stage1", "starts from": None, "seed offset": 0, "zero": True,
        "sets": ["el", "hu"], "shares": {"new": 1.0},
        "trained": {"gate.wg", "experts"},
        "losses": {"next_token": 1.0, "balance": 0.02},
        "dropped": set(), "norm": None,
    }),
    (2, {
        "name": "stage2", "starts from": 1, "seed offset": 1, "zero": False,
        "sets": ["en", "el", "hu"], "shares": {"old": 0.3, "new": 0.7},
        "trained": {"gate.wg", "gate.classifier"},
        "losses": {"next_token": 1.0, "lpr": 0.3, "classifier": 0.4},
        "dropped": {"bf16", "data_types", "zero_optimization"}, "norm": 5.0,
    }),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    tree = run_tree(tmp_path)
    tree["stage1"] |= {"balance_weight": 0.02}
    tree["stage2"] |= {"lpr_weight": 0.3, "classifier_weight": 0.4}
    return parse_run(tree, "tiny.yaml")


@pytest.fixture
def model() -> Any:
    """Two layers with routers and classifiers, one dense layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=3, **sizes)).train()
    plan = ExpertPlan.first_expansion([3, 1, 4], old=["en"], new=["el"], top_k=2, classifier_layers=[0, 2])
    install_moe_layers(model, plan, classifiers=True)
    for name, parameter in model.named_parameters():
        if "deepspeed_moe" in name:
            parameter.data.normal_(0, 0.3)
    return model


def micro_batch(model: Any, counts: int = 8) -> MicroBatch:
    """One sample of eight tokens of which three are old; the first ``counts`` of them count."""
    ids = torch.arange(8).view(1, 8)
    with collect_routings(model) as routings:
        logits = model(input_ids=ids, use_cache=False).logits
    places = torch.arange(8)
    return MicroBatch(logits, routings, ids + 1, places < counts, (places % 3 != 1).long(), samples=1, world_size=2)


@pytest.mark.parametrize(("number", "expected"), TABLE, ids=["stage1", "stage2"])
def test_what_each_stage_is(number: int, expected: dict[str, Any], run: RunConfig, model: Any) -> None:
    stage = find_stage(run, number)
    assert (stage.name, stage.starts_from, stage.seed_offset, stage.uses_zero) == (
        expected["name"], expected["starts from"], expected["seed offset"], expected["zero"],
    )  # fmt: skip
    assert list(stage.sets(run.data)) == expected["sets"]
    assert stage.shares() == pytest.approx(expected["shares"])
    stage.train_only(model)
    kinds = ("gate.wg", "gate.classifier", "experts")
    trained = {
        next((kind for kind in kinds if kind in name), name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained == expected["trained"]
    losses = stage.losses(micro_batch(model), GlobalBatch(samples=4, sequence_length=8, old_tokens=5))
    assert {name: weight for name, (_, weight) in losses.items()} == expected["losses"]
    assert set(DS_CONFIG) - set(stage.adapt_ds_config(DS_CONFIG)) == expected["dropped"]
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.grad = torch.tensor([[3.0, 4.0]])
    assert stage.gradient_norm(linear) == expected["norm"]


def test_losses_are_parts_of_the_global_batchs_mean(run: RunConfig, model: Any) -> None:
    batch, micro = GlobalBatch(samples=4, sequence_length=8, old_tokens=5), micro_batch(model, counts=6)
    expected = torch.nn.functional.cross_entropy(micro.logits_BLV[0, :6], micro.labels_BL[0, :6], reduction="sum") / 32
    first, second = (
        find_stage(run, number).losses(replace(micro, logits_BLV=micro.logits_BLV.clone()), batch) for number in (1, 2)
    )
    torch.testing.assert_close(first["next_token"][0], expected)
    torch.testing.assert_close(second["next_token"][0], expected)
    balance = load_balancing_loss(micro.routings, mask_T=micro.counts_T)
    torch.testing.assert_close(first["balance"][0], balance / 4 / 2)  # a quarter of the batch, on two ranks
    torch.testing.assert_close(second["lpr"][0], lpr_loss(micro.routings, micro.group_T, micro.counts_T) / 5)
    torch.testing.assert_close(
        second["classifier"][0], classifier_loss(micro.routings, micro.group_T, micro.counts_T) / 32
    )


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_the_router_z_loss_is_the_mean_over_the_global_batch_of_the_squared_logsumexp(
    number: int, run: RunConfig, model: Any
) -> None:
    batch, micro = GlobalBatch(samples=4, sequence_length=8, old_tokens=5), micro_batch(model, counts=6)
    assert "router_z" not in find_stage(run, number).losses(micro, batch)
    stage = STAGES[number](run.stage(number).model_copy(update={"z_loss_weight": 0.5}))
    loss, weight = stage.losses(micro, batch)["router_z"]
    each = [[math.log(sum(math.exp(z) for z in token)) ** 2 for token in r.logits_TE.tolist()] for r in micro.routings]
    assert loss.item() == pytest.approx((sum(each[0][:6]) + sum(each[1][:6])) / 2 / 32)
    assert weight == 0.5
    (gradient,) = torch.autograd.grad(loss, micro.routings[0].logits_TE)
    assert (gradient[:6] != 0).all() and (gradient[6:] == 0).all()


def test_a_bias_balances_instead_of_the_loss_by_the_sign_of_what_is_missing_to_the_mean_load(
    run: RunConfig, model: Any
) -> None:
    stage = STAGES[1](run.stage1.model_copy(update={"balance": "bias", "bias_update_rate": 0.01}))
    assert stage.balances_by_bias
    assert not any(find_stage(run, number).balances_by_bias for number in (1, 2))
    batch = GlobalBatch(samples=4, sequence_length=8, old_tokens=5)
    assert set(stage.losses(micro_batch(model), batch)) == {"next_token"}
    routers = [Router(16, num_experts, 2, has_classifier=False, has_selection_bias=True) for num_experts in (3, 4)]
    for layer, router in zip(moe_layers(model), routers, strict=True):
        layer.deepspeed_moe.gate = router
    stage.end_step(model, [torch.tensor([10.0, 2.0, 3.0]), torch.tensor([4.0, 4.0, 2.0, 6.0])])
    stage.end_step(model, [torch.tensor([10.0, 5.0, 0.0]), torch.tensor([4.0, 4.0, 2.0, 6.0])])
    torch.testing.assert_close(routers[0].selection_bias, torch.tensor([-0.02, 0.01, 0.02]))
    torch.testing.assert_close(routers[1].selection_bias, torch.tensor([0.0, 0.0, 0.02, -0.02]))
    find_stage(run, 1).end_step(model, [torch.tensor([10.0, 2.0, 3.0]), torch.tensor([4.0, 4.0, 2.0, 6.0])])
    find_stage(run, 2).end_step(model, [torch.tensor([10.0, 2.0, 3.0]), torch.tensor([4.0, 4.0, 2.0, 6.0])])
    torch.testing.assert_close(routers[0].selection_bias, torch.tensor([-0.02, 0.01, 0.02]))


def test_the_routers_kl_is_the_mean_over_new_tokens_from_the_routers_as_the_stage_found_them(
    run: RunConfig, model: Any
) -> None:
    batch = GlobalBatch(samples=4, sequence_length=8, old_tokens=5)
    stage = STAGES[2](run.stage(2).model_copy(update={"router_kl_weight": 0.7}))
    stage.begin(model)
    routers = [layer.router for layer in moe_layers(model)]
    found_weights = [router.wg.weight.detach().clone() for router in routers]
    assert stage.losses(micro_batch(model), batch)["router_kl"][0].item() == 0.0
    for router in routers:
        router.wg.weight.data.normal_(0, 1)
    inputs: list[torch.Tensor] = []
    handles = [router.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for router in routers]
    micro = micro_batch(model, counts=6)
    for handle in handles:
        handle.remove()
    expected = 0.0
    for x, weight, routing in zip(inputs, found_weights, micro.routings, strict=True):
        before = (x @ weight.T).softmax(-1).detach()
        for token in (0, 2, 3, 5):  # 1 and 4 are old, 6 and 7 do not count
            pairs = zip(before[token].tolist(), routing.scores_TE[token].tolist(), strict=True)
            expected += sum(p * math.log(p / q) for p, q in pairs) / 2 / 27
    loss, weight = stage.losses(micro, batch)["router_kl"]
    assert loss.item() == pytest.approx(expected, rel=1e-4) and expected > 0
    assert weight == 0.7
    loss.backward()
    assert all(router.wg.weight.grad is not None and router.reference.grad is None for router in routers)


def test_without_a_weight_for_their_kl_routers_keep_no_reference(run: RunConfig, model: Any) -> None:
    stage = find_stage(run, 2)
    stage.begin(model)
    micro = micro_batch(model)
    assert all(routing.reference_logits_TE is None for routing in micro.routings)
    assert "router_kl" not in stage.losses(micro, GlobalBatch(samples=4, sequence_length=8, old_tokens=5))


def test_a_batch_of_old_tokens_alone_gives_a_router_kl_of_0(run: RunConfig, model: Any) -> None:
    stage = STAGES[2](run.stage(2).model_copy(update={"router_kl_weight": 0.7}))
    stage.begin(model)
    moe_layers(model)[0].router.wg.weight.data.normal_(0, 1)
    micro = micro_batch(model)
    all_old = replace(micro, group_T=torch.zeros_like(micro.group_T))
    loss, _ = stage.losses(all_old, GlobalBatch(samples=1, sequence_length=8, old_tokens=8))["router_kl"]
    assert loss.item() == 0.0


def test_stage_1_may_review_old_languages_with_their_loss(run: RunConfig, model: Any) -> None:
    settings = run.stage1.model_copy(update={"old_share": 0.2, "lpr_weight": 0.3, "lpr": "reference"})
    stage = STAGES[1](settings)
    assert stage.shares() == {"old": 0.2, "new": 0.8}
    assert list(stage.sets(run.data)) == ["en", "el", "hu"]
    batch, micro = GlobalBatch(samples=4, sequence_length=8, old_tokens=5), micro_batch(model, counts=6)
    loss, weight = stage.losses(micro, batch)["lpr"]
    expected = lpr_loss(micro.routings, micro.group_T, micro.counts_T, form="reference") / 5
    torch.testing.assert_close(loss, expected)
    assert weight == 0.3
    assert "lpr" not in find_stage(run, 1).losses(micro, batch)


def test_local_balance_statistics_weigh_this_ranks_own_samples(run: RunConfig, model: Any) -> None:
    settings = run.stage1.model_copy(update={"balance_statistics": "local"})
    batch, micro = GlobalBatch(samples=4, sequence_length=8, old_tokens=5), micro_batch(model, counts=0)
    loss, _ = STAGES[1](settings).losses(micro, batch)["balance"]
    assert loss.item() == 0.0  # none of its samples counts


def test_a_run_without_stage_2_has_one_stage(run: RunConfig) -> None:
    assert [stage.number for stage in stages_of(run)] == [1, 2]
    alone = run.model_copy(update={"stage2": None})
    assert [stage.number for stage in stages_of(alone)] == [1]
    with pytest.raises(UserError, match="stage2: the run has no such section; add it, or train --stage 1"):
        find_stage(alone, 2)

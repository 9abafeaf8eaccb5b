"""What a further expansion starts from, before it trains. Run: pytest tests/distributed/test_expansion_start.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.sample import sample_documents
from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.weights import local_expert_names
from pipeline.method.expand import expand, most_used_experts
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.model.moe.experts import fused_weights
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from tests.distributed.conftest import Pools
from tests.distributed.rounds import TOTAL, Model, Tree, run, same, tree_of
from tests.helpers.tiny import do_steps, parse_run


def test_new_experts_can_be_copies_of_the_one_that_the_new_languages_use_most(
    second_round: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"run": second_round["base"], "checkpoint": "stage1"}  # where no classifier keeps tokens on expert 0
    experts = {**second_round["experts"], "copy_of": "most_used"}
    tree = second_round | {"name": "most", "base": base, "experts": experts}
    context = RunContext(parse_run(tree, "x"))
    RunFolder.create(context.run)
    do_steps(context, "tokenize", "similarity", "allocate", "upcycle")
    assert context.base is not None
    before, plan = Model.of(RunContext(context.base.run), "stage1"), context.base.plan
    copied = read_manifest(context.upcycled, UpcycledManifest).copied
    assert copied is not None and copied[2] == 0, "layer 2 was dense"
    assert f"copies of the most used one, by layer: {' '.join(map(str, copied))}" in capsys.readouterr().out
    assert context.plan.rounds[-1].source == "most used expert"
    documents = [document.ids for document in sample_documents(context.planned, "hu", 4096)]
    assert copied == counted_by_hand(before.module, plan, documents)
    check_copies(before, context, context.upcycled, copied)


def test_the_most_used_experts_are_those_that_most_tokens_choose_and_copies_of_them_are_exact(
    second_round: Tree, tmp_path: Path
) -> None:
    context = RunContext(parse_run(second_round, "x"))
    assert context.base is not None
    before, plan = Model.of(RunContext(context.base.run)), context.base.plan
    torch.manual_seed(3)
    documents = [np.arange(start, start + 60) * 7 % 290 for start in range(5)]
    with torch.no_grad():
        inputs = mlp_inputs(before.module, torch.from_numpy(np.stack(documents)))
    layers = dict(zip(plan.moe_layers, moe_layers(before.module), strict=True))
    for number in (0, 3):  # expert 0 scores least for most tokens, and no classifier sends them there
        layers[number].router.wg.weight.data.normal_()
        layers[number].router.wg.weight.data[0] = -10 * inputs[number].mean(0)
        layers[number].router.classifier.weight.data.zero_()
    copied = most_used_experts(before.module, plan, documents)
    assert copied == counted_by_hand(before.module, plan, documents)
    assert len(set(copied)) > 1 and copied[2] == 0
    manifest = read_manifest(context.base.upcycled, UpcycledManifest)
    samples = np.stack(documents)[:, :30]
    base = context.base.upcycled, manifest
    target = tmp_path / "copies"
    written = expand(before.module, plan, context.plan, base, samples, target, seed=1, key="x", copied=copied)
    assert written.copied == copied
    check_copies(before, context, target, copied)


def check_copies(before: Model, context: RunContext, upcycled: Path, copied: list[int]) -> None:
    """Experts that were there are as they were, and new ones are copies of those named."""
    dense = load_dense(context.dense, torch.float32)
    after = load_upcycled(upcycled, context.plan, torch.float32, classifiers=True)
    for (index, number), prefix in local_expert_names(after).items():
        layer = context.plan.moe_layers[index]
        found = dict(after.get_submodule(prefix).state_dict())
        source = number + 1 if number < context.plan.num_frozen(layer) else copied[layer]
        mlp = fused_weights(dense.model.layers[layer].mlp.state_dict())
        assert same(found, before.experts[layer, source] if source else mlp), (layer, number)


def counted_by_hand(model: Any, plan: ExpertPlan, documents: list[Any]) -> list[int]:
    """The expert that most of a document's tokens choose, by layer."""
    counts = [torch.zeros(count) for count in plan.counts]
    for ids in documents:
        with collect_routings(model) as routings, torch.no_grad():
            model(input_ids=torch.tensor(ids.astype("int64")).unsqueeze(0), use_cache=False)
        for layer, routing in zip(plan.moe_layers, routings, strict=True):
            for chosen, active in zip(routing.ids_TK.tolist(), routing.active_TK.tolist(), strict=True):
                for expert, is_computed in zip(chosen, active, strict=True):
                    counts[layer][expert] += is_computed
    return [int(count.argmax()) for count in counts]


def test_rows_that_were_trained_stay_and_a_new_class_begins_as_its_neighbour(second_round: Tree) -> None:
    context = RunContext(parse_run(second_round, "x"))
    assert context.base is not None
    plans = {"before": context.base.plan, "after": context.plan}
    before = Model.of(RunContext(context.base.run)).module
    after = load_upcycled(context.upcycled, plans["after"], torch.float32, classifiers=True)
    routers = {layer: one.router for layer, one in zip(plans["before"].moe_layers, moe_layers(before), strict=True)}
    for layer, one in zip(plans["after"].moe_layers, moe_layers(after), strict=True):
        if layer not in routers:
            assert layer == 2
            continue
        old = routers[layer].wg.weight
        assert torch.equal(one.router.wg.weight[: len(old)], old)
        assert one.router.wg.weight[len(old) :].abs().sum() > 0 or len(old) == len(one.router.wg.weight)
        if one.router.classifier is not None:
            trained = routers[layer].classifier.weight
            assert torch.equal(one.router.classifier.weight, torch.cat([trained, trained[-1:]]))


def test_with_new_experts_out_of_the_choice_the_expanded_model_is_the_one_before(second_round: Tree) -> None:
    context = RunContext(parse_run(second_round, "x"))
    assert context.base is not None
    before = Model.of(RunContext(context.base.run)).module
    after = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
    ids = torch.arange(24).view(2, 12) * 11 % 290
    layers = dict(zip(context.plan.moe_layers, moe_layers(after), strict=True))
    with torch.no_grad():
        expected = before(input_ids=ids, use_cache=False).logits
        different = (after(input_ids=ids, use_cache=False).logits - expected).abs().max()
        inputs = mlp_inputs(before, ids)
        for layer, old in ((0, 3), (3, 4)):  # a row that scores all these tokens lowest: more dimensions than tokens
            rows = torch.linalg.pinv(inputs[layer]) @ torch.full((ids.numel(), 1), -50.0)
            layers[layer].router.wg.weight[old:] = rows.T
        layers[2].router.wg.weight[1:] = 0.0  # a copy of the MLP beside it: equal whatever the weights
        found = after(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert different > 1e-3, "with random rows some tokens take a new expert, a copy of expert 0"


def mlp_inputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's MLP or MoE layer gets, [tokens, hidden] each."""
    found: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_a_base_that_was_balanced_by_biases_keeps_them_and_new_experts_begin_without(
    pools: Pools, tmp_path: Path
) -> None:
    first, second = (tree_of(tmp_path, number, ranks=1) for number in (0, 1))
    first["stage1"] = {**first["stage1"], "balance": "bias", "bias_update_rate": 0.05}
    base = Model.of(run(pools, first, 1))
    biases = [layer.router.selection_bias for layer in moe_layers(base.module)]
    assert biases[0] is not None and biases[0].any()  # layer 0 has 3 experts; of 2, top-2 takes both alike
    context = run(pools, second, 1)
    upcycled = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
    for model in (upcycled, Model.of(context).module):  # stage 1 balances by its loss, and leaves them as they are
        found = [layer.router.selection_bias for layer in moe_layers(model)]
        old = iter(biases)
        for layer, bias in zip(context.plan.moe_layers, found, strict=True):
            before = next(old) if TOTAL[0][layer] > 1 else torch.zeros(0)
            assert bias is not None and before is not None
            assert torch.equal(bias[: len(before)], before) and not bias[len(before) :].any()

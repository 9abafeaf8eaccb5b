"""Three expansions one after the other: what was learned stays. Run: pytest tests/distributed/test_expansion.py"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_prep.sample import sample_documents
from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.tensors import expert_file
from pipeline.checkpoint.weights import local_expert_names
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.evaluation.checkpoints import checkpoint_to_score, load_model
from pipeline.method.expand import expand, most_used_experts
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import ONE_RANK, load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.model.moe.experts import fused_weights
from pipeline.model.moe.router import classify
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, REPORT_FILE, RunFolder
from pipeline.report.page import write_page
from pipeline.run.checks import sample_warnings
from pipeline.run.context import RunContext
from pipeline.run.runner import do_step
from pipeline.run.steps import step_named, steps_of
from pipeline.training.sample_order import stage_order
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps
from tests.distributed.test_elastic import FEW, Trained, check_pair, name
from tests.distributed.test_staleness import on_rank
from tests.helpers.tiny import do_steps, parse_run, run_tree, save_corpus, save_model

Tree = dict[str, Any]
LANGUAGES = ("el", "hu", "tr")
# Experts that each round's allocation gives; a further one adds one less. Layer 2 is dense at first.
COUNTS = ([3, 2, 1, 4], [2, 1, 2, 3], [3, 2, 2, 3])
TOTAL = ([3, 2, 1, 4], [4, 2, 2, 6], [6, 3, 3, 8])


def tree_of(folder: Path, number: int, **parallel: int) -> Tree:
    """The settings of a round; each starts from the one before."""
    corpus = save_corpus(folder / "text", ["en", *LANGUAGES])
    paths = {language: {"path": str(path)} for language, path in corpus.items()}
    changes: Tree = {
        "name": f"g{number + 1}",
        "experts": {"allocation": "explicit", "counts": COUNTS[number], "classifier_layers": [0, 3]},
        "similarity": {"tokens": 300},
        "parallel": {"micro_batch_size": 1, **parallel},
    }
    tree = run_tree(folder, **changes)
    old = ["en", *LANGUAGES[:number]]
    tree["data"] |= {"old": {name: paths[name] for name in old}, "new": {LANGUAGES[number]: paths[LANGUAGES[number]]}}
    if number:
        tree["base"] = str(folder / "runs" / f"g{number}")
        del tree["model"]
    return tree


def run(pools: Pools, tree: Tree, ranks: int) -> RunContext:
    """All steps of a run, those of training and scoring on so many ranks."""
    context = RunContext(parse_run(tree, "x"), quiet=True)
    RunFolder.create(context.run)
    for step in steps_of(context.run):
        if step.keeps_manifest:
            if step.needs_ranks and step.has_work(context):
                assert pools[ranks].run(on_rank, tree, step.name, False) == [True] * ranks
            else:
                do_step(context, step)
    return RunContext(context.run)


@dataclass(frozen=True)
class Model:
    """A model after a stage: its experts by (layer, number); what is neither router nor expert, by the dense names."""

    module: Any
    experts: dict[tuple[int, int], dict[str, torch.Tensor]]
    rest: dict[str, torch.Tensor]

    @classmethod
    def of(cls, context: RunContext, label: str = "stage2") -> "Model":
        folders = {stage: context.folder / stage for stage in context.stages}
        identities = {number: context.identity(number) for number in context.run.stage_numbers}
        scored = checkpoint_to_score(folders, label, identities, context.untrained)
        model = load_model(scored, context.untrained, torch.float32, ONE_RANK, torch.device("cpu"))
        experts = {
            (context.plan.moe_layers[index], number + 1): dict(model.get_submodule(prefix).state_dict())
            for (index, number), prefix in local_expert_names(model).items()
        }
        rest = {n.replace(".base_mlp.", "."): p for n, p in model.named_parameters() if ".deepspeed_moe." not in n}
        return cls(model, experts, rest)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2), (4, 2)])
def test_three_expansions_leave_all_that_was_trained_before_as_it_was(
    pools: Pools, tmp_path: Path, ranks: int, ep_size: int
) -> None:
    dense = load_dense(save_model(tmp_path / "model"), torch.float32)
    before: Model | None = None
    scores: list[dict[str, float]] = []
    for number in range(3):
        context = run(pools, tree_of(tmp_path, number, ranks=ranks, ep_size=ep_size), ranks)
        model = Model.of(context)
        assert list(context.plan.counts) == TOTAL[number]
        assert [one.languages for one in context.plan.rounds] == [("en",), *((x,) for x in LANGUAGES[: number + 1])]
        assert len(model.experts) == sum(TOTAL[number]) - 4
        assert same(model.rest, dict(dense.named_parameters()))
        for (layer, expert), weights in model.experts.items():
            known = before is not None and (layer, expert) in before.experts
            if known:
                assert same(weights, before.experts[layer, expert]), (layer, expert)
            else:
                mlp = fused_weights(dense.model.layers[layer].mlp.state_dict())
                assert not any(torch.equal(weights[name], mlp[name]) for name in mlp), "a new expert trains"
        classifiers = [layer.router.classifier for layer in moe_layers(model.module)]
        assert [len(one.weight) for one in classifiers if one is not None] == [number + 2] * 2
        evaluation = Evaluation.load(context.folder / EVALUATION_FILE)
        scores.append(evaluation.sets["en"].bits_per_character)
        check_own_experts(evaluation, number, context)
        before = model
    # Each run is compared with the model that it starts from.
    assert [one["base"] for one in scores[1:]] == [one["stage2"] for one in scores[:-1]]


def check_own_experts(evaluation: Evaluation, number: int, context: RunContext) -> None:
    """How much of earlier languages' routing weight is on the experts of their time is known, and in the report."""
    earlier = ["en", *LANGUAGES[:number]] if number else []
    assert sorted(evaluation.own_experts) == sorted(earlier)
    for language, by_label in evaluation.own_experts.items():
        labels = ["stage1", "stage2"] if number == 0 else ["base", "stage1", "stage2"]
        assert list(by_label) == labels
        assert all(0 < share <= 1 + 1e-6 for share in by_label.values())
        if language == LANGUAGES[number - 1]:
            assert by_label["base"] == pytest.approx(1.0), "before, there were no other experts"
            assert by_label["stage1"] < 1.0
    write_page(context.folder, [step.name for step in steps_of(context.run)])
    page = (context.folder / REPORT_FILE).read_text(encoding="utf-8")
    assert page.count("of its routing weight is on the experts of its time") == len(earlier)
    assert page.count("copies of the original MLP") == (number + 1 if number else 0)


@pytest.fixture(scope="module")
def second_round(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The settings of a second round that is done up to upcycling."""
    folder = tmp_path_factory.mktemp("rounds")
    run(pools, tree_of(folder, 0, ranks=1), 1)
    tree = tree_of(folder, 1)
    context = RunContext(parse_run(tree, "x"))
    RunFolder.create(context.run)
    do_steps(context, "tokenize", "similarity", "allocate", "upcycle")
    return tree


@pytest.mark.parametrize("pair", FEW[:4], ids=lambda pair: f"{name(pair[0])} to {name(pair[1])}")
@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_a_second_round_resumes_on_other_ranks_with_the_same_optimizer(
    pools: Pools,
    second_round: Tree,
    tmp_path: Path,
    number: int,
    pair: tuple[ParallelDims, ParallelDims],
) -> None:
    check_pair(pools, Trained(pools, second_round, tmp_path / "trained"), pair, number, "fp32", tmp_path / "moved")


def test_a_checkpoint_of_a_second_round_holds_the_experts_that_train_alone(
    pools: Pools, second_round: Tree, tmp_path: Path
) -> None:
    spread = second_round | {"parallel": {"ranks": 2, "ep_size": 2, "micro_batch_size": 1}}
    pools[2].run(train_steps, spread, 1, tmp_path, 1, 1)
    files = {path.name for path in (tmp_path / "step000001").glob("layer_*")}
    # Layers 0, 2 and 3 got 1, 1 and 2 experts after 2, 0 and 3.
    expected = [(0, 2), (2, 0), (3, 3), (3, 4)]
    assert files == {expert_file(layer, number) for layer, number in expected}


def test_tokens_of_each_language_keep_the_experts_of_its_time(pools: Pools, second_round: Tree) -> None:
    context = RunContext(parse_run(second_round, "x"))
    order = stage_order(context.store, context.run.data, context.stage(2), context.plan, context.run.seed)
    assert {source.name: source.group for source in order.sources} == {"en": 0, "el": 1, "hu": 2}
    assert [context.plan.old_experts(layer) for layer in range(4)] == [(1, 3), (1, 2), (1, 1), (1, 4)]


@pytest.mark.parametrize(("change", "line"), [
    ({"base": "nowhere"}, "base.run: nowhere holds no run.yaml; name the folder of a run that was trained"),
    ({"base": {"run": "{base}", "checkpoint": "stage3"}}, "--checkpoint stage3: unknown"),
    ({"experts": {"allocation": "explicit", "counts": [1, 1, 1, 1]}}, "no layer gets a new expert"),
    ({"experts": {"allocation": "explicit", "counts": [2, 1, 1, 1], "top_k": 1}}, "experts.top_k: 1, but"),
    ({"experts": {"allocation": "explicit", "counts": [2, 1, 1, 1], "init": "random"}}, "experts.init: a further"),
    ({"experts": {"allocation": "explicit", "counts": [2, 1, 1, 1], "noise": 0.1}}, "experts.noise: a further"),
    ({"experts": {"allocation": "explicit", "counts": [2, 1, 1, 1], "classifier": "sequence"}},
     "experts.classifier: sequence, but the base run's classify each token; give that"),
])  # fmt: skip
def test_a_mistake_in_a_further_expansion_is_one_line(second_round: Tree, change: Tree, line: str) -> None:
    text = json.dumps(change).replace("{base}", second_round["base"])
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        context = RunContext(parse_run({**second_round, **json.loads(text), "name": "other"}, "x"))
        RunFolder.create(context.run)
        do_steps(context, "tokenize", "similarity", "allocate")
    assert "\n" not in str(caught.value)


def test_another_checkpoint_of_the_base_or_reset_routers_make_stale_what_depends_on_them(second_round: Tree) -> None:
    def inputs(tree: Tree) -> dict[str, Any]:
        context = RunContext(parse_run(tree, "x"))
        names = ("tokenize", "similarity", "allocate", "upcycle")
        return {name: step_named(name).inputs(context) for name in names}

    before = inputs(second_round)
    earlier = inputs(second_round | {"base": {"run": second_round["base"], "checkpoint": "stage1"}})
    assert [name for name in before if before[name] != earlier[name]] == ["similarity", "allocate", "upcycle"]
    reset = inputs(second_round | {"experts": {**second_round["experts"], "router": "reset"}})
    assert [name for name in before if before[name] != reset[name]] == ["upcycle"]
    most_used = inputs(second_round | {"experts": {**second_round["experts"], "copy_of": "most_used"}})
    assert [name for name in before if before[name] != most_used[name]] == ["allocate"]


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


def test_decoding_with_a_cache_and_padding_on_the_left_equals_the_full_sequence(second_round: Tree) -> None:
    context = RunContext(parse_run(second_round, "x"))
    model = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
    torch.manual_seed(5)
    for layer in moe_layers(model):
        layer.router.wg.weight.data.normal_()
        if layer.router.classifier is not None:
            layer.router.classifier.weight.data.normal_()
    sequences = [torch.arange(start, start + length) * 13 % 290 for start, length in ((0, 12), (5, 9), (40, 4))]
    width = max(map(len, sequences))
    ids = torch.stack([torch.nn.functional.pad(one, (width - len(one), 0)) for one in sequences])
    mask = torch.stack([torch.arange(width) >= width - len(one) for one in sequences]).long()
    with torch.no_grad(), collect_routings(model) as routings:
        alone = [model(input_ids=one.unsqueeze(0), use_cache=False).logits[0] for one in sequences]
        cache, found = None, []
        for end in range(1, width + 1):
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, -1:]
            output = model(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], position_ids=positions,
                           past_key_values=cache, use_cache=True)  # fmt: skip
            cache = output.past_key_values
            found.append(output.logits)
    classes = {int(c) for routing in routings if routing.class_logits_TC is not None
               for c in classify(routing.class_logits_TC)}  # fmt: skip
    assert classes == {0, 1, 2}, "tokens of every group are among them"
    for row, (one, expected) in enumerate(zip(sequences, alone, strict=True)):
        torch.testing.assert_close(torch.cat(found, 1)[row, width - len(one) :], expected, rtol=1e-5, atol=1e-5)


def test_a_group_without_replay_is_named(second_round: Tree) -> None:
    tree = copy.deepcopy(second_round)
    context = RunContext(parse_run(tree, "x"))
    assert not any("replays no text" in line for line in sample_warnings(context, [2]))
    del tree["data"]["old"]["el"]
    without = RunContext(parse_run(tree, "x"))
    (line,) = [line for line in sample_warnings(without, [2]) if "replays no text" in line]
    assert line == "stage 2 replays no text of el, so nothing protects them: add some to data.old"


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
    assert biases[0] is not None and biases[0].any()  # of two experts a token takes both
    context = run(pools, second, 1)
    upcycled = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
    for model in (upcycled, Model.of(context).module):  # stage 1 balances by its loss, and leaves them as they are
        found = [layer.router.selection_bias for layer in moe_layers(model)]
        old = iter(biases)
        for layer, bias in zip(context.plan.moe_layers, found, strict=True):
            before = next(old) if TOTAL[0][layer] > 1 else torch.zeros(0)
            assert bias is not None and before is not None
            assert torch.equal(bias[: len(before)], before) and not bias[len(before) :].any()

"""Three expansions one after the other: what was learned stays. Run: pytest tests/distributed/test_expansion.py"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from pipeline.checkpoint.tensors import expert_file
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import load_dense, moe_layers
from pipeline.model.moe import collect_routings
from pipeline.model.moe.experts import fused_weights
from pipeline.model.moe.router import classify
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, REPORT_FILE, RunFolder
from pipeline.report.page import write_page
from pipeline.run.checks import sample_warnings
from pipeline.run.context import RunContext
from pipeline.run.steps import step_named, steps_of
from pipeline.training.sample_order import stage_order
from tests.distributed.conftest import Pools
from tests.distributed.rounds import LANGUAGES, TOTAL, Model, Tree, run, same, tree_of
from tests.distributed.stages import train_steps
from tests.distributed.test_elastic import FEW, Trained, check_pair, name
from tests.helpers.tiny import do_steps, parse_run, save_model


@pytest.mark.parametrize(("ranks", "ep_size"), [*(pytest.param(n, n, marks=pytest.mark.slow) for n in (1, 2)), (4, 2)])
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

"""Three expansions one after the other: what was learned stays. Run: pytest tests/distributed/test_expansion.py"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.files import read_json
from pipeline.checkpoint.weights import local_expert_names
from pipeline.evaluation.checkpoints import checkpoint_to_score, load_model
from pipeline.model.backbone import ONE_RANK, load_dense, moe_layers
from pipeline.model.moe.experts import fused_weights
from pipeline.records.run_folder import EVALUATION_FILE, RunFolder
from pipeline.run.context import RunContext
from pipeline.run.runner import do_step
from pipeline.run.steps import steps_of
from tests.distributed.conftest import Pools
from tests.distributed.test_staleness import on_rank
from tests.helpers.tiny import parse_run, run_tree, save_corpus, save_model

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
    """A run's last model: its experts by (layer, number); what is neither router nor expert, by the dense names."""

    module: Any
    experts: dict[tuple[int, int], dict[str, torch.Tensor]]
    rest: dict[str, torch.Tensor]

    @classmethod
    def of(cls, context: RunContext) -> "Model":
        folders = {stage: context.folder / stage for stage in context.stages}
        identities = {number: context.identity(number) for number in context.run.stage_numbers}
        scored = checkpoint_to_score(folders, "stage2", identities, context.upcycled)
        model = load_model(scored, context.upcycled, context.plan, torch.float32, ONE_RANK, torch.device("cpu"))
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
        scores.append(read_json(context.folder / EVALUATION_FILE)["sets"]["en"]["bits_per_character"])
        before = model
    # Each run is compared with the model that it starts from.
    assert [one["base"] for one in scores[1:]] == [one["stage2"] for one in scores[:-1]]

"""Runs that expand one another, and what comes of each."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.weights import local_expert_names
from pipeline.evaluation.checkpoints import checkpoint_to_score, load_model
from pipeline.model.backbone import ONE_RANK
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.importing import import_exported
from pipeline.run.runner import do_step
from pipeline.run.steps import steps_of
from tests.distributed.conftest import Pools
from tests.distributed.test_staleness import on_rank
from tests.helpers.tiny import parse_run, run_tree, save_corpus

Tree = dict[str, Any]
LANGUAGES = ("el", "hu", "tr")
BALANCED: Tree = {"stage1": {"balance": "bias", "bias_update_rate": 0.05}}
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
        if step.keeps_manifest and step.applies(context.run):
            if step.needs_ranks and step.has_work(context):
                assert pools[ranks].run(on_rank, tree, step.name, False) == [True] * ranks
            else:
                do_step(context, step)
    return RunContext(context.run)


def imported(tree: Tree, folder: Path, label: str | None = None, dtype: str | None = None) -> Path:
    """A run's checkpoint, exported and imported."""
    export_run(RunContext(parse_run(tree, "x")), label, dtype, folder / "exported")
    import_exported(folder / "exported", folder / "imported")
    shutil.rmtree(folder / "exported")
    return folder / "imported"


def with_changes(tree: Tree, changes: Tree) -> Tree:
    """A run's settings with others, sections key by key."""
    return {**tree, **{key: {**tree[key], **value} if isinstance(value, dict) else value
                       for key, value in changes.items()}}  # fmt: skip


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

"""Stage 1 that one run of a sweep trains for others. Run: pytest tests/distributed/test_shared_stage.py"""

import copy
import errno
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import sha256_file
from pipeline.records.run_folder import RunFolder
from pipeline.run.shared_stage import share_stage, take_shared_stage
from tests.distributed.conftest import Pools
from tests.distributed.test_staleness import entries, run
from tests.helpers.tiny import parse_run, run_tree

Tree = dict[str, Any]


@pytest.fixture
def trees(tmp_path: Path, pools: Pools) -> tuple[Tree, Tree]:
    """A run that is done, and one that reviews otherwise and has no classifiers, for which it trains stage 1."""
    first = run_tree(tmp_path, similarity={"tokens": 300}, validate={"every_tokens": 768})
    run(pools, first)
    second = copy.deepcopy(first) | {"name": "second"}
    second["stage2"]["lpr_weight"] = 0.0
    second["experts"]["classifier_layers"] = []
    share_stage(parse_run(second, "x"), parse_run(first, "x"))
    return first, second


def folder_of(tree: Tree) -> RunFolder:
    return RunFolder(Path(tree["output_dir"]) / tree["name"])


def files(tree: Tree) -> dict[str, Path]:
    """By their names below it, the files of a run's stage 1."""
    folder = folder_of(tree) / "stage1"
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_of_the_other_run_are_linked_and_what_comes_after_is_the_runs_own(
    trees: tuple[Tree, Tree], pools: Pools
) -> None:
    first, second = trees
    scores = entries(first, "scores")
    assert run(pools, second) == ["tokenize", "similarity", "allocate", "upcycle", "stage1", "stage2", "evaluate"]
    theirs, ours = files(first), files(second)
    assert theirs.keys() == ours.keys()
    linked = {name for name in ours if theirs[name].samefile(ours[name])}
    assert linked == {name for name in ours if name.startswith("step")}
    assert all(sha256_file(theirs[name]) == sha256_file(ours[name]) for name in ours)
    manifests = [folder_of(tree).manifest("stage1") for tree in trees]
    assert manifests[0].outputs == manifests[1].outputs and manifests[0].figures == manifests[1].figures
    base, validated = ((folder_of(tree) / "validation_base.json").read_bytes() for tree in trees)
    assert base == validated, "what stage 2's validations are compared with"
    assert len(entries(first, "scores") - scores) == len(["en", "el", "hu"]), "of stage 2 alone"
    assert run(pools, second) == []


def test_stage_1_is_trained_where_its_inputs_are_others(trees: tuple[Tree, Tree], pools: Pools) -> None:
    first, second = trees
    second["stage1"]["lr"] = 2e-2
    run(pools, second, until="stage1")
    theirs, ours = files(first), files(second)
    assert not any(theirs[name].samefile(ours[name]) for name in theirs.keys() & ours.keys())
    assert folder_of(second).manifest("stage1").figures != folder_of(first).manifest("stage1").figures


def test_training_it_again_leaves_the_other_run_as_it_was(trees: tuple[Tree, Tree], pools: Pools) -> None:
    first, second = trees
    run(pools, second)
    before = {name: sha256_file(path) for name, path in files(first).items()}
    second["stage1"]["lr"] = 2e-2
    assert run(pools, second, force=True) == ["stage1", "stage2", "evaluate"]
    assert {name: sha256_file(path) for name, path in files(first).items()} == before
    assert run(pools, first) == []


def test_a_disk_without_room_is_one_line_and_leaves_nothing(
    trees: tuple[Tree, Tree], pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first, second = trees
    run(pools, second, until="upcycle")
    monkeypatch.setattr("pipeline.run.shared_stage.link_or_copy", no_room)
    with pytest.raises(UserError, match=r"second/stage1: can't be linked from .*/tiny/stage1 \(.*No space left"):
        take_shared_stage(folder_of(second), folder_of(first).manifest("stage1").done_with)
    assert not [path.name for path in folder_of(second).path.iterdir() if "stage1" in path.name]


def test_a_run_trains_stage_1_itself_where_the_other_has_not(tmp_path: Path, pools: Pools) -> None:
    tree = run_tree(tmp_path, similarity={"tokens": 300})
    second = copy.deepcopy(tree) | {"name": "second"}
    share_stage(parse_run(second, "x"), parse_run(tree, "x"))
    assert run(pools, second, until="stage1")[-1] == "stage1"
    assert folder_of(second).has_manifest("stage1") and not folder_of(tree).path.exists()

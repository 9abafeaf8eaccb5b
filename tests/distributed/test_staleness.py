"""What a change makes stale: the steps that run again, and nothing else.

Run: pytest tests/distributed/test_staleness.py
"""

import copy
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.distributed.process_group import Ranks
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE, RunFolder
from pipeline.run.context import RunContext
from pipeline.run.runner import do_step, finish_step
from pipeline.run.steps import step_named, steps_of
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_a_step_of
from tests.helpers.tiny import parse_run, run_tree, save_corpus

Tree = dict[str, Any]
EVERYTHING = ["tokenize", "similarity", "allocate", "upcycle", "stage1", "stage2", "evaluate"]


def on_rank(ranks: Ranks, tree: Tree, name: str, force: bool) -> bool:
    """A step's work on this rank."""
    return finish_step(RunContext(parse_run(tree, "x"), force=force), step_named(name), ranks)


def run(pools: Pools, tree: Tree, *, force: bool = False, until: str = "report") -> list[str]:
    """What `python -m pipeline run` does, with a rank of the pool; the names of the steps that were not done."""
    context = RunContext(parse_run(tree, "x"), force=force, quiet=True)
    RunFolder.create(context.run)
    ran = []
    for step in steps_of(context.run):
        if step.keeps_manifest and not step.is_done(context):
            ran.append(step.name)
            if step.needs_ranks and step.has_work(context):
                assert pools[1].run(on_rank, tree, step.name, force) == [True]
            else:
                do_step(context, step)
        if step.name == until:
            break
    return ran


def entries(tree: Tree, name: str) -> set[str]:
    """What a folder of the cache holds: token sets, similarities, upcycled checkpoints or scores."""
    found = (Path(tree["cache_dir"]) / name).iterdir()
    return {path.name for path in found if not path.name.startswith(".") and path.suffix != ".html"}


@pytest.fixture
def tree(tmp_path: Path, pools: Pools) -> Tree:
    """A tiny run that has been trained and evaluated."""
    tree = run_tree(tmp_path, similarity={"tokens": 300})
    assert run(pools, tree) == EVERYTHING
    assert run(pools, tree) == []
    return tree


def with_watch(tree: Tree, text: Path) -> Tree:
    """The same run with one more set to score."""
    changed = copy.deepcopy(tree)
    changed["data"]["watch"] = {"tr": {"path": str(text), "language": "tr"}}
    return changed


def test_a_new_watch_set_is_tokenized_alone_and_scored_with_the_checkpoints_that_are_there(
    tree: Tree, tmp_path: Path, pools: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, scores = entries(tree, "tokens"), entries(tree, "scores")
    changed = with_watch(tree, save_corpus(tmp_path / "watch", ["tr"], pages=5)["tr"])
    assert run(pools, changed) == ["tokenize", "evaluate"]
    assert len(entries(tree, "tokens") - tokens) == 1
    assert len(entries(tree, "scores") - scores) == 3, "base, stage 1 and stage 2, on the new set alone"
    evaluation = Evaluation.load(RunFolder(Path(tree["output_dir"]) / "tiny") / EVALUATION_FILE)
    assert list(evaluation.sets["tr"].bits_per_character) == ["base", "stage1", "stage2"]
    assert "tokens: 0 copies of new held-out text in the kept training sets en, el, hu" in capsys.readouterr().out
    assert run(pools, changed) == []


def test_copies_of_a_new_watch_text_in_what_was_trained_on_are_counted_in_one_line(
    tree: Tree, tmp_path: Path, pools: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(tree["data"]["new"]["el"]["path"]).read_text(encoding="utf-8").splitlines(keepends=True)
    copied = tmp_path / "copied.jsonl"
    copied.write_text("".join(lines[:20]), encoding="utf-8")
    capsys.readouterr()
    assert run(pools, with_watch(tree, copied)) == ["tokenize", "evaluate"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: training sees")]
    assert " tr," in line and "el (" in line
    held_out = Evaluation.load(RunFolder(Path(tree["output_dir"]) / "tiny") / EVALUATION_FILE).sets["el"].pages
    seen = sum(f"page-{number}" not in held_out for number in range(20))
    assert f"{seen} cop" in line, line


def test_a_changed_replay_makes_stage_2_stale_and_not_stage_1(tree: Tree, pools: Pools) -> None:
    scores = entries(tree, "scores")
    changed = copy.deepcopy(tree)
    changed["data"]["replay"] = {"tokens": 2500}
    with pytest.raises(UserError, match=r"tokenize: done in .* with other inputs: data\.replay is new\. Add --force"):
        run(pools, changed)
    assert run(pools, changed, force=True) == ["tokenize", "stage2", "evaluate"]
    assert len(entries(tree, "scores") - scores) == len(["en", "el", "hu"]), "stage 2 alone"


def test_force_resumes_a_stage_that_was_stopped_unless_its_inputs_have_changed(tree: Tree, pools: Pools) -> None:
    other = {**copy.deepcopy(tree), "name": "stopped"}
    assert run(pools, other, until="upcycle")
    assert pools[1].run(train_a_step_of, other, False)
    [printed] = pools[1].run(train_a_step_of, other, True)
    assert "resumed from" in printed and "after 1 steps" in printed
    other["stage1"]["lr"] = 3e-3
    with pytest.raises(UserError, match=r"stage1: begun in .* with other inputs: stage1\.lr was 0\.01, is 0\.003"):
        run(pools, other)
    [printed] = pools[1].run(train_a_step_of, other, True)
    assert "resumed from" not in printed


def test_a_second_run_over_the_same_languages_shares_tokens_similarity_upcycling_and_the_base_scores(
    tree: Tree, pools: Pools
) -> None:
    before = {name: entries(tree, name) for name in ("tokens", "similarity", "upcycled", "scores")}
    second = {**copy.deepcopy(tree), "name": "second"}
    second["stage1"]["lr"] = 3e-3
    assert run(pools, second) == EVERYTHING
    after = {name: entries(tree, name) for name in before}
    assert {name: after[name] for name in ("tokens", "similarity", "upcycled")} == {
        name: before[name] for name in ("tokens", "similarity", "upcycled")
    }
    assert len(after["scores"] - before["scores"]) == 2 * len(["en", "el", "hu"]), "stage 1 and stage 2, not the base"

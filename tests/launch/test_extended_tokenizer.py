"""A run with a tokenizer of its own, by the commands that users type.

Run: pytest tests/launch/test_extended_tokenizer.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.prepare import prepare
from data_prep.statistics.charts import OF_OWN
from pipeline.distributed.process_group import alone
from pipeline.estimate.report import estimate_of
from pipeline.evaluation.scoring import score_sets
from pipeline.model.backbone import load_dense
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.records.evaluation import Evaluation, ValidationBase
from pipeline.records.run_folder import EVALUATION_FILE, STATISTICS_FILE, VALIDATION_BASE_FILE, RunFolder
from pipeline.run.context import RunContext
from pipeline.run.scoring import held_out_keys
from tests.helpers.tiny import HIDDEN, VOCAB_SIZE, parse_run, run_tree, write_run
from tests.launch.test_commands import command

ADDED = 40
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("extended tokenizer")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done, report and all; ``run.yaml`` there names the extended tokenizer."""
    folder = tmp_path_factory.mktemp("extended")
    changes: dict[str, Any] = {
        "parallel": {"ranks": 2, "ep_size": 2},
        "validate": {"every_tokens": 768, "max_tokens_per_set": 10**6},
    }
    path = write_run(folder, **changes)
    printed = command(sys.executable, "-m", "data_prep", "extend-tokenizer", str(path), "--add", str(ADDED))
    assert f"use it: --set model.tokenizer={folder / 'run-tokenizer'}" in printed
    tree = run_tree(folder, **changes, model={"tokenizer": str(folder / "run-tokenizer")})
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    printed = command(sys.executable, "-m", "pipeline", "run", str(path))
    assert f"{ADDED} new tokens from id {VOCAB_SIZE} on" in printed
    assert "report: " in printed
    return folder


@pytest.fixture(scope="module")
def tree(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text())
    return found


def test_the_dense_model_is_scored_by_its_own_tokenizer_as_in_any_other_run(
    folder: Path, tree: dict[str, Any]
) -> None:
    run = parse_run(tree, "x")
    plain = run.preparation.model_copy(update={"model": run.model.model_copy(update={"tokenizer": None})})
    store = prepare(plain, "local")
    assert store is not None
    before = RunContext(run.model_copy(update={"model": plain.model}))
    before.__dict__["store"] = store
    assert held_out_keys(before) == held_out_keys(RunContext(run))  # so that `compare` has intervals between them
    model, ranks = load_dense(Path(run.model.path), torch.float32), alone("cpu")
    result = Evaluation.load(run.folder / EVALUATION_FILE)
    validated = ValidationBase.load(run.folder / VALIDATION_BASE_FILE)
    for name in ("en", "el", "hu"):
        expected = score_sets(model, store, [name], ranks, window=run.evaluate.window)[name]
        bits = result.sets[name].bits_by_document
        assert bits["base"] == [pytest.approx(value, abs=1e-2) for value in expected.bits]
        assert result.sets[name].characters == sum(expected.characters)
        if name == "en":  # the untrained mixture, before its first step
            assert validated.sets[name].bits == [pytest.approx(value, rel=1e-5) for value in expected.bits]
    assert max(result.sets["el"].bits_per_character.values()) == result.sets["el"].bits_per_character["base"]
    assert result.sets["el"].change["stage2"].percent < -10


def test_parameters_count_the_new_rows_and_the_estimate_says_the_same(tree: dict[str, Any]) -> None:
    run = parse_run(tree, "x")
    counts = Evaluation.load(run.folder / EVALUATION_FILE).parameters
    assert estimate_of(run).counts() == counts
    without = estimate_of(run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": None})}))
    rows = 2 * ADDED * HIDDEN  # embedding and head
    for kind, more in (
        ("dense", 0),
        ("total", rows),
        ("active", rows),
        ("stage1_trained", rows),
        ("stage2_trained", 0),
    ):
        assert counts[kind] == without.counts()[kind] + more, kind


def test_the_report_shows_fertility_before_and_after(tree: dict[str, Any]) -> None:
    run = parse_run(tree, "x")
    figures = json.loads((run.folder / STATISTICS_FILE).read_text())["sets"]["el"]["train"]
    assert figures["fertility"] < figures["fertility_before"]
    assert OF_OWN.replace("'", "&#39;") in (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_upcycled_folder_has_the_extended_tokenizer_and_a_receipt_over_old_ids(
    folder: Path, tree: dict[str, Any]
) -> None:
    upcycled = RunFolder(parse_run(tree, "x").folder) / "upcycled"
    tokenizer = (folder / "run-tokenizer" / "tokenizer.json").read_bytes()
    assert (upcycled / "hf" / "tokenizer.json").read_bytes() == tokenizer
    manifest = UpcycledManifest.parse(
        {k: v for k, v in json.loads((upcycled / "manifest.json").read_text()).items() if k != "checksum"}, "x"
    )
    assert manifest.parity["holds"]
    assert manifest.new_rows is not None and manifest.new_rows.train
    assert manifest.new_row_parameters == 2 * ADDED * HIDDEN


def test_a_second_run_skips_all_and_without_the_tokenizer_it_asks_for_force(folder: Path) -> None:
    path = str(folder / "run.yaml")
    printed = command(sys.executable, "-m", "pipeline", "run", path)
    assert all(f"{step}: done, skipped" in printed for step in ("tokenize", "upcycle", "stage1", "stage2", "evaluate"))
    printed = command(sys.executable, "-m", "pipeline", "run", path, "--set", "model.tokenizer=null", code=2)
    assert f"model.tokenizer was {folder / 'run-tokenizer'}, is null" in printed
    assert "--force" in printed


def test_what_depends_on_the_tokenizer_is_stale_with_another_and_similarity_is_not(tree: dict[str, Any]) -> None:
    from pipeline.run.steps import step_named

    def inputs(model: dict[str, Any]) -> dict[str, Any]:
        context = RunContext(parse_run({**tree, "model": model}, "x"))
        return {name: step_named(name).inputs(context) for name in ("tokenize", "similarity", "upcycle")}

    extended, own = inputs(tree["model"]), inputs({"path": tree["model"]["path"]})
    assert [name for name in own if own[name] != extended[name]] == ["tokenize", "upcycle"]


def test_an_extended_tokenizer_that_reorders_old_ids_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    definition = json.loads((folder / "run-tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = definition["model"]["vocab"]
    one, two = [token for token, number in vocabulary.items() if number in (50, VOCAB_SIZE + 1)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    for path in (folder / "run-tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    for verb in ("tokenize", "estimate"):
        change = ("--set", f"model.tokenizer={tmp_path}", "--set", "name=other")
        printed = command(sys.executable, "-m", "pipeline", verb, str(folder / "run.yaml"), *change, code=2)
        [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert f"model.tokenizer: {tmp_path}: the model's tokenizer has" in line
        assert "old tokens keep their ids and new ones come after them" in line

"""Settings that preparation reads, and what its small tools promise. Run: pytest tests/data_prep/test_config.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.errors import UserError
from common.files import save_array, write_once
from common.seeded import seeded_hash, seeded_order
from common.settings import load_settings, parse_settings
from data_prep.config import PreparationConfig
from data_prep.reading.hub import hub_failures
from pipeline.config.load import load_run
from tests.helpers.tiny import run_tree

TREE: dict[str, Any] = {"model": {"path": "m"}, "data": {"new": {"el": {"path": "el.jsonl"}}}}


def test_preparation_reads_its_part_of_a_run_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({**run_tree(tmp_path), "seed": 5}))
    config = load_settings(PreparationConfig, run, ["stage1.tokens=4096", "experts=nonsense"])
    assert (config.seed, config.stage1.tokens, config.cache_dir) == (5, 4096, tmp_path / "cache")
    assert config.tokenizer == (str(tmp_path / "model"), None)
    assert load_run(run, ["stage1.tokens=4096"]).preparation == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {**TREE["data"], "watched": {}}}, "data.watched: unknown key; did you mean watch?"),
        ({"data": {**TREE["data"], "token_dtype": "auto"}}, "data.token_dtype: unknown key; "),
        (
            {"data": {**TREE["data"], "bad_rows": "x"}},
            "data.bad_rows: 'x' is not allowed; it should be 'stop' or 'skip'",
        ),
        (
            {"data": {**TREE["data"], "benchmarks": {"quiz": {"path": "quiz.jsonl", "max_documents": 5}}}},
            "data: benchmarks.quiz: budgets are for training text; a benchmark is compared whole",
        ),
        (
            {"data": {**TREE["data"], "benchmarks": {"quiz": {"path": "quiz.jsonl", "max_characters": 5}}}},
            "data: benchmarks.quiz: budgets are for training text; a benchmark is compared whole",
        ),
        (
            {"data": {**TREE["data"], "benchmarks": {"quiz": {"path": "quiz.jsonl", "weight": 2}}}},
            "data: benchmarks.quiz.weight: a benchmark is not trained on; leave its weight out",
        ),
        ({"seed": -1}, "seed: -1 is not allowed; it should be greater than or equal to 0"),
        ({"model": {}}, "model.path: missing; add it"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_settings(PreparationConfig, {**TREE, **change}, "run.yaml")
    assert str(raised.value).startswith(f"run.yaml: {says}")
    assert "\n" not in str(raised.value)


def test_seeded_choices_are_the_same_everywhere_and_depend_on_seed_and_names() -> None:
    assert seeded_hash(17, "page-38") == seeded_hash(17, "page-38") < 0.1 * 2**64
    assert len({seeded_hash(seed, name) for seed in (1, 2) for name in ("a", "b", "a\0b")}) == 6
    order = seeded_order(17, 50, "slices")
    assert sorted(order) == list(range(50)) and order != list(range(50))
    assert order != seeded_order(18, 50, "slices") and order != seeded_order(17, 50, "slices of source 0")


def test_a_file_that_is_written_once_stays_and_an_array_comes_back(tmp_path: Path) -> None:
    write_once(tmp_path / "plan.json", b"first")
    write_once(tmp_path / "plan.json", b"second")
    save_array(tmp_path / "folder" / "a.npy", np.arange(3))
    assert (tmp_path / "plan.json").read_bytes() == b"first"
    assert np.load(tmp_path / "folder" / "a.npy").tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.npy", "folder", "plan.json"]


def test_whatever_a_client_of_the_hub_raises_is_one_line_with_a_fix() -> None:
    said = r"^a/b: not given \(ValueError: two lines\); check the name$"
    with pytest.raises(UserError, match=said), hub_failures("a/b: not given", "check the name"):
        raise ValueError("two\n  lines")
    with pytest.raises(UserError, match=r"^as it is$"), hub_failures("a/b: not given", "check the name"):
        raise UserError("as it is")

"""A language that the model knew and that becomes worse is named, or stops training.

Run: pytest tests/distributed/test_forgetting.py
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from common.errors import AgreedError
from pipeline.checkpoint.store import complete_tags
from pipeline.distributed.process_group import Ranks
from pipeline.records.evaluation import ValidationBase
from pipeline.records.metrics import ValidationRow
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_to_the_end, with_parallel
from tests.helpers.tiny import prepared_run, run_tree, save_corpus

HARMFUL = {"lr": 0.05, "warmup_ratio": 0.0}


def train(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> str:
    """The product's loop; why it stopped, or nothing."""
    try:
        train_to_the_end(ranks, tree, number, folder)
    except AgreedError as error:
        return str(error)
    return ""


def save_letters(path: Path, seed: int) -> str:
    """Pages of Latin letters alone: learning Greek words and figures can only make these less likely."""
    random = Random(seed)
    rows = [{"text": "".join(random.choices("abcdefgh", k=150)), "page": f"page-{page}"} for page in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that validates every two steps, with a set to watch in the language that the model knows."""
    folder = tmp_path_factory.mktemp("forgetting")
    old = {name: save_letters(folder / f"{name}.jsonl", number) for number, name in enumerate(("en", "en-watch"))}
    watch = {name: {"path": old[name], "language": "en"} for name in ("en-watch",)}
    watch["el-watch"] = {"path": str(save_corpus(folder / "watch", ["el"], pages=12)["el"]), "language": "el"}
    changes: dict[str, Any] = {
        "validate": {"every_tokens": 512, "max_tokens_per_set": 1000},
        "data": {"old": {"en": {"path": old["en"]}}, "watch": watch},
    }
    prepared_run(folder, distinct_experts=False, **changes)
    return with_parallel(run_tree(folder, **changes), ranks=2, ep_size=2)


def test_old_languages_that_become_worse_are_named_and_training_goes_on(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    harmful = {**tree, "stage1": {**tree["stage1"], **HARMFUL}}
    assert pools[2].run(train, harmful, 1, tmp_path / "stage1") == ["", ""]
    base = ValidationBase.load(tmp_path / "validation_base.json").sets
    assert set(base) == {"en", "en-watch"}, "not the new languages, nor what is watched of them"
    rows = ValidationRow.load_rows(tmp_path / "stage1" / "validation.jsonl")
    assert len(rows) == 3 and rows[-1].forgotten
    for row in rows:
        for name, percent in row.forgotten.items():
            expected = 100 * (row.sets[name] / base[name].bits_per_character - 1)
            assert percent == pytest.approx(expected, abs=1e-3) and percent > 0


def test_forgetting_beyond_the_limit_saves_and_stops(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    limited = {**tree["validate"], "stop_if_forgetting": 0.5}
    harmful = {**tree, "stage1": {**tree["stage1"], **HARMFUL}, "validate": limited}
    reasons = pools[2].run(train, harmful, 1, tmp_path / "stage1")
    assert reasons[0] == reasons[1]
    assert "against the base model, more than validate.stop_if_forgetting=0.5; stopped after step 2" in reasons[0]
    assert complete_tags(tmp_path / "stage1")[0] == "step000002"


def test_nothing_is_named_where_nothing_changes(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    harmless = {**tree, "stage1": {**tree["stage1"], "lr": 1e-9}}
    assert pools[2].run(train, harmless, 1, tmp_path / "stage1") == ["", ""]
    rows = ValidationRow.load_rows(tmp_path / "stage1" / "validation.jsonl")
    assert [row.forgotten for row in rows] == [{}] * 3
    base = ValidationBase.load(tmp_path / "validation_base.json").sets
    assert rows[0].sets["en"] == pytest.approx(base["en"].bits_per_character, rel=1e-5)

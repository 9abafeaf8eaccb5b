"""Similarities from a file. Run: pytest tests/pipeline/method/test_given_similarity.py"""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.config.experts import ExpertsConfig
from pipeline.method.allocation import allocate
from pipeline.method.given_similarity import given_similarity

PUBLISHED = Path(__file__).parents[2] / "golden" / "llama3.2-3b-g1-similarity.json"
PAIRS = {"el&hu": [0.4, 0.2], "el&en": [0.2, 0.4], "en&hu": [0.4, 0.2]}


def save(folder: Path, value: Any) -> Path:
    path = folder / "given.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_the_published_file_gives_the_published_experts() -> None:
    found = given_similarity(PUBLISHED, 28)
    counts = allocate(ExpertsConfig(delta=70), 28, found.by_layer).counts
    assert counts == json.loads(PUBLISHED.read_text())["experts_per_layer_including_the_original"]


def test_without_s_it_is_worked_out_from_pairs_in_either_order(tmp_path: Path) -> None:
    found = given_similarity(save(tmp_path, {"old": ["en"], "new": ["el", "hu"], "pairs": PAIRS}), 2)
    assert found.by_layer == pytest.approx([(0.4 + 0.3) / 2, (0.2 + 0.3) / 2])
    assert found.pairs == PAIRS and found.tokens == {}


def test_a_runs_own_file_is_taken_as_it_is(tmp_path: Path) -> None:
    tree = {"old": ["en"], "new": ["el"], "tokens": {"en": 5, "el": 5}, "pairs": {}, "by_layer": [0.5, 0.25]}
    assert given_similarity(save(tmp_path, tree), 2).model_dump() == tree


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "can't be read as JSON"),
        ("[1]", "holds no similarities"),
        ({"old": ["en"], "new": [], "pairs": {}}, "holds no similarities"),
        ({"old": ["en"], "new": ["el", "hu"], "pairs": {"el&hu": [0.1]}}, "holds no similarities"),
        ({"old": ["en"], "new": ["el", "hu"], "pairs": {**PAIRS, "el&en": [0.1, 0.2, 0.3]}}, "holds no similarities"),
        ({"old": ["en"], "new": ["el"], "pairs": {}, "by_layer": [0.5]}, "has 1 layers, but the model has 2"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^experts\.similarity: .*given\.json {says}"):
        given_similarity(save(tmp_path, value), 2)
    with pytest.raises(UserError, match=r"^experts\.similarity: \. is not there"):
        given_similarity(Path("."), 2)

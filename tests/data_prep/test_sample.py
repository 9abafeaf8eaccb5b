"""Random documents of a set, whatever its budgets leave. Run: pytest tests/data_prep/test_sample.py"""

from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.prepare import plan_preparation
from data_prep.sample import SLICES, sample_documents
from tests.data_prep.conftest import pages
from tests.helpers.preparation import config_of

Tree = dict[str, Any]


@pytest.fixture
def sample(tree: Tree, save_tokenizer: Any, tmp_path: Path) -> Any:
    """sample(tokens, data settings …): the texts that are drawn of the Greek set, in order."""
    tokenizer = save_tokenizer()

    def draw(tokens: int, **settings: Any) -> tuple[list[str], int]:
        data = DataConfig.model_validate({**tree, **settings})
        planned = plan_preparation(config_of(data, tokenizer, 300, tmp_path / "cache", 17, 5000))
        documents = sample_documents(planned, "el", tokens)
        for document in documents:
            assert document.ids.tolist() == planned.encoder.encode([document.text])[0].tolist()
        return [document.text for document in documents], sum(len(document.ids) for document in documents)

    return draw


def test_a_sample_is_of_the_whole_text_and_of_nothing_that_is_held_out(sample: Any, stored: Any, tree: Tree) -> None:
    held_out = {document.page for document in stored(tree).held_out_documents("el")}
    everything = {row["text"]: row["page"] for row in pages("el", 60)}
    texts, tokens = sample(10**9)
    assert sorted(everything[text] for text in texts) == sorted(set(everything.values()) - held_out)
    few, fewer = sample(tokens // 2)
    assert tokens // 2 <= fewer <= tokens // 2 + max(map(len, few))
    numbers = [int(everything[text].removeprefix("page-")) for text in few]
    assert numbers != sorted(numbers)
    tenths = {number // 6 for number in numbers}
    assert len(tenths) >= min(SLICES, 10) - 1, "each of the file's slices gives a share"


@pytest.mark.parametrize(
    "change",
    [
        {"replay": {"tokens": 200}},
        {"watch": {"seen": None}},
        {"held_out": {"by": "page", "fraction": 0.1, "near_copy_threshold": 0.5}},
    ],
    ids=["replay", "watch", "copies"],
)
def test_a_sample_does_not_depend_on_what_becomes_of_the_set(sample: Any, watched: Tree, change: Tree) -> None:
    change = {"watch": {"seen": watched}} if "watch" in change else change
    assert sample(500, **change) == sample(500)


def test_caps_do_not_limit_a_sample(sample: Any, tree: Tree) -> None:
    capped = {"el": {**tree["new"]["el"], "max_documents": 2}}
    assert sample(500, new=capped) == sample(500)


def test_filters_hold_for_a_sample(sample: Any) -> None:
    texts, _ = sample(10**9, filters={"max_characters": 60})
    everything, _ = sample(10**9)
    assert sorted(texts) == sorted(text for text in everything if len(text) <= 60)
    assert 0 < len(texts) < len(everything)

"""No more of a corpus is read than its budgets need. Run: pytest tests/data_prep/test_slices_to_read.py"""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.prepare import plan_preparation
from data_prep.reading import documents
from data_prep.slices_to_read import LEAST
from data_prep.store import TokenStore
from tests.data_prep.conftest import pages
from tests.helpers.preparation import config_of

Tree = dict[str, Any]
SLICES = 250


@pytest.fixture
def large(tree: Tree, write_rows: Any) -> Tree:
    """A Greek corpus of 250 slices of 8 pages, beside a small English one."""
    rows = [{**row, "page": f"{part}-{row['page']}"} for part in range(100) for row in pages("el", 20)]
    for number, row in enumerate(rows):
        row["text"] += f" {number}"
    path = write_rows("large.jsonl", rows)
    size = path.stat().st_size
    return {**tree, "slice_bytes": size // SLICES + 1, "new": {"el": {"path": str(path)}}}


@pytest.fixture
def planned(save_tokenizer: Any, tmp_path: Path) -> Any:
    """planned(tree, el settings …): the plan of the Greek set."""
    tokenizer = save_tokenizer()

    def plan(tree: Tree, stage1_tokens: int = 10**6, **settings: Any) -> Any:
        changed = {**tree, "new": {"el": {**tree["new"]["el"], **settings}}}
        config = config_of(DataConfig.model_validate(changed), tokenizer, 300, tmp_path / "cache", 17, stage1_tokens)
        return {one.name: one for one in plan_preparation(config).sets}

    return plan


def test_without_a_budget_all_is_read(large: Tree, planned: Any) -> None:
    assert len(planned(large)["el"].slices) == SLICES


@pytest.mark.parametrize("cap", [{"max_documents": 20}, {"max_tokens": 2000}, {"max_characters": 2000}])
def test_a_cap_limits_what_is_read(large: Tree, planned: Any, cap: Tree) -> None:
    assert len(planned(large, **cap)["el"].slices) == LEAST
    tenfold = {unit: 20 * limit for unit, limit in cap.items()}
    assert LEAST < len(planned(large, **tenfold)["el"].slices) < SLICES


def test_a_capped_set_has_what_its_cap_says(large: Tree, stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capped = {**large, "new": {"el": {**large["new"]["el"], "max_documents": 200}}}
    store: TokenStore = stored(capped)
    assert store.train("el").num_documents == 200
    manifest = store.sets["el"].manifest
    assert manifest.slices < SLICES
    assert store.held_out("el").num_documents >= 10


def test_a_cap_that_what_was_read_does_not_fill_is_a_warning(
    large: Tree, stored: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    greek = {**large["new"]["el"], "max_documents": 200}
    stored({**large, "new": {"el": greek}})
    assert "slices that were read" not in capsys.readouterr().out
    # Of its first slices nothing is a copy, of the whole nearly everything.
    path = Path(greek["path"])
    text = json.loads(path.read_text().splitlines()[0])["text"]
    rows = [{"text": text, "page": str(number)} for number in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = {"exact_duplicates": True}
    store: TokenStore = stored({**large, "filters": filters, "new": {"el": greek}})
    has = store.train("el").num_documents
    line = next(line for line in capsys.readouterr().out.splitlines() if "slices that were read" in line)
    assert has < 200
    assert line.startswith("warning: set el: max_documents=200 asked, but the ")
    assert line.endswith(
        f"gave {has} documents: more of them was filtered than of the text's beginning; a higher cap reads more"
    )


def test_only_the_chosen_slices_are_read(large: Tree, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.phases import filter as filter_phase

    read: set[int] = set()
    original = documents.read_documents

    def counting(splits: Any, *arguments: Any) -> Any:
        read.update(split.start for split in splits if "large" in split.file)
        return original(splits, *arguments)

    monkeypatch.setattr(filter_phase, "read_documents", counting)
    checked = {**large, "held_out": {"by": "page", "fraction": 0.1, "near_copy_threshold": 0.8}}
    stored({**checked, "new": {"el": {**large["new"]["el"], "max_documents": 20}}}, workers=1)
    assert len(read) == LEAST


def test_another_cap_or_replay_leaves_the_text_the_same_where_as_much_is_read(large: Tree, planned: Any) -> None:
    one, two = planned(large, max_documents=20), planned(large, max_documents=21)
    assert one["el"].text == two["el"].text and one["el"].key != two["el"].key
    assert planned(large, max_documents=800)["el"].text != one["el"].text
    assert planned(large, max_documents=800)["el"].corpus == one["el"].corpus
    replayed = {**large, "replay": {"share": 0.001}}
    texts = {planned(replayed, tokens)["en"].text for tokens in (10**5, 10**6)}
    assert len(texts) == 1, "English has few slices, so all of it is read"


def test_which_slices_are_read_is_in_the_key_of_the_text(
    large: Tree, save_tokenizer: Any, write_rows: Any, tmp_path: Path
) -> None:
    path, tokenizer = large["new"]["el"]["path"], save_tokenizer()
    other = str(write_rows("other.jsonl", (json.loads(line) for line in Path(path).read_text().splitlines())))

    def texts(caps: tuple[int, int], seed: int = 17) -> dict[str, str]:
        sources = [{"path": file, "max_documents": cap} for file, cap in zip((path, other), caps, strict=True)]
        watched = {"seen": {"path": path, "language": "el", "max_documents": 40}}
        data = DataConfig.model_validate({**large, "new": {"el": {"sources": sources}}, "watch": watched})
        config = config_of(data, tokenizer, 300, tmp_path / "cache", seed)
        return {one.name: one.text for one in plan_preparation(config).sets}

    assert texts((20, 400))["el"] != texts((400, 20))["el"], "as many slices in all, of other sources"
    assert texts((20, 20))["seen"] == texts((400, 20))["seen"]
    assert texts((20, 20))["seen"] != texts((20, 20), seed=18)["seen"], "other slices of the watch set"


def test_a_watch_set_with_a_cap_is_scored_in_part(large: Tree, stored: Any) -> None:
    watched = {"seen": {"path": large["new"]["el"]["path"], "language": "el", "max_documents": 40}}
    store: TokenStore = stored({**large, "watch": watched, "new": {"el": {**large["new"]["el"], "max_documents": 20}}})
    assert store.held_out("seen").num_documents == 40
    rows = [row.page for row in store.held_out_documents("seen")]
    assert len(set(rows)) == 40
    assert json.loads((store.sets["seen"].folder / "manifest.json").read_text())["slices"] == LEAST

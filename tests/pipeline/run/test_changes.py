"""Changed inputs are named by the user's keys. Run: pytest tests/pipeline/run/test_changes.py"""

from typing import Any

import pytest

from pipeline.run.changes import differences, explain

RUN: dict[str, Any] = {
    "seed": 17,
    "model": {"path": "m"},
    "data": {
        "old": {"en": {"path": "en.jsonl", "weight": 1.0, "max_tokens": None}},
        "new": {"el": {"path": "el.jsonl", "weight": 1.0, "max_tokens": None}},
        "watch": {},
        "filters": {"normalize": None},
        "temperature": None,
    },
    "experts": {"num_new": 60},
    "stage1": {"tokens": 100, "lr": 1e-4},
    "stage2": {"tokens": 10, "lr": 1e-4},
    "deepspeed": "a.json",
}
INPUTS: dict[str, Any] = {
    "sets": {"en": "1", "el": "2"},
    "model": "3",
    "upcycled": "4",
    "settings": {"lr": 1e-4},
    "experts": {"num_new": 60},
    "deepspeed": {"bf16": {"enabled": True}},
}


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one key changed."""
    first, _, rest = key.partition(".")
    return {**tree, first: changed(tree.get(first, {}), rest, value) if rest else value}


@pytest.mark.parametrize(
    ("input_key", "run_key", "value", "line"),
    [
        ("settings.lr", "stage1.lr", 2e-4, "stage1.lr was 0.0001, is 0.0002"),
        ("experts.num_new", "experts.num_new", 30, "experts.num_new was 60, is 30"),
        ("sets.fr", "data.watch.fr", {"path": "fr.jsonl"}, "data.watch.fr is new"),
        ("sets.en", "data.old.en.max_tokens", 5, "data.old.en.max_tokens was null, is 5"),
        ("sets.en", "stage1.tokens", 200, "stage1.tokens was 100, is 200"),
        ("sets.el", "data.filters.normalize", "NFC", "data.filters.normalize was null, is NFC"),
        ("sets.el", "data.new.hu", {"path": "hu.jsonl"}, "data.new.hu is new"),
        ("upcycled", "experts.num_new", 30, "experts.num_new was 60, is 30"),
        ("deepspeed.bf16.enabled", "deepspeed", "b.json", "deepspeed was a.json, is b.json"),
        ("model", "model.path", "n", "model.path was m, is n"),
        # What a setting names has changed, not the setting.
        ("sets.en", "stage2.lr", 5, "the text of en has changed"),
        ("model", "stage2.lr", 5, "the model's files have changed"),
        ("upcycled", "stage2.lr", 5, "upcycled has been made again"),
        ("deepspeed.bf16.enabled", "stage2.lr", 5, "deepspeed.bf16.enabled was True, is x"),
        # A weight does not change a text, nor does another set's cap where a set's own has changed too.
        ("sets.en", "data.old.en.weight", 5, "the text of en has changed"),
    ],
)
def test_a_changed_input_is_named_by_the_key_that_it_follows_from(
    input_key: str, run_key: str, value: Any, line: str
) -> None:
    changes = differences(INPUTS, changed(INPUTS, input_key, "x"))
    assert [change.key for change in changes] == [input_key]
    assert explain("stage1", changes, RUN, changed(RUN, run_key, value)) == [line]


def test_a_set_is_named_by_its_own_keys_rather_than_another_sets() -> None:
    now = changed(changed(RUN, "data.old.en.max_tokens", 5), "data.new.el.max_tokens", 7)
    changes = differences(INPUTS, changed(INPUTS, "sets.el", "x"))
    assert explain("stage1", changes, RUN, now) == ["data.new.el.max_tokens was null, is 7"]


def test_a_set_that_is_gone_is_called_so() -> None:
    now = {**RUN, "data": {**RUN["data"], "old": {}}}
    changes = differences(INPUTS, {**INPUTS, "sets": {"el": "2"}})
    assert explain("tokenize", changes, RUN, now) == ["data.old.en is gone"]

"""The table names languages that the model has forgotten. Run: pytest tests/pipeline/report/test_result_table.py"""

import pytest

from pipeline.records.evaluation import Change, Evaluation, Group, SetResult
from pipeline.report.result_table import result_table


def result(group: Group, language: str, percent: float, interval: float | None) -> SetResult:
    """A set whose bits change by so many percent in stage 1."""
    return SetResult(
        group=group, language=language, documents=2, characters=100,
        bits_per_character={"base": 1.0, "stage1": 1 + percent / 100},
        change={"stage1": Change(percent=percent, interval=interval)}, bits_by_document={}, pages=["a", "b"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("percent", "interval", "is_named"),
    [(1.2, 0.3, True), (0.2, 0.3, False), (-1.2, 0.3, False), (1.2, None, False), (0.01, 0.0, False)],
)
def test_what_is_worse_beyond_its_interval_is_named(percent: float, interval: float | None, is_named: bool) -> None:
    sets = {
        "en": result("old", "en", percent, interval),
        "el": result("new", "el", 5.0, 0.1),
        "en-news": result("watch", "en", percent, interval),
        "fr-news": result("watch", "fr", 5.0, 0.1),
    }
    evaluation = Evaluation(window=64, checkpoints=["base", "stage1"], sets=sets, routing={}, parameters={})
    assert list(evaluation.forgotten("stage1")) == (["en", "en-news"] if is_named else [])
    assert evaluation.forgotten("base") == {}
    lines = result_table(evaluation).splitlines()
    marked = [line.split()[1] for line in lines if line.endswith("FORGOTTEN")]
    assert marked == (["en", "en-news"] if is_named else [])
    assert (
        lines[-1] == "FORGOTTEN: a language that the model knew takes more bits than before, beyond the interval"
    ) == is_named

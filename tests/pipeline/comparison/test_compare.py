"""Runs side by side. Run: pytest tests/pipeline/comparison"""

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from plotly.offline import get_plotlyjs

from pipeline.cli.main import command_line
from pipeline.comparison.compare import compare
from pipeline.comparison.page import gain_against_forgetting, page
from pipeline.comparison.read import read_runs
from pipeline.comparison.table import MISSING, as_text, tables
from pipeline.comparison.write import default_folder
from pipeline.config.load import load_run
from pipeline.evaluation.evaluate import paired_change
from pipeline.method.stages import find_stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.comparison import Comparison
from pipeline.records.evaluation import Evaluation
from pipeline.training.utilization import flops_of_stage
from tests.helpers.compared_runs import CONFIG, save_run, settings
from tests.pipeline.report.test_report import Page

SMALL = {"en": 0.5, "el": -20.0, "tr": -10.0, "en-udhr": 1.0}


def with_new(el: float, tr: float, en: float) -> dict[str, float]:
    return {"en": en, "el": el, "tr": tr, "en-udhr": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ by seed alone, one of another learning rate, one of other documents and more experts.

    One of the three says more of its data, which changes no result.
    """
    root = tmp_path_factory.mktemp("runs")
    said: dict[int, dict[str, Any]] = {18: {"data.new.el.license": "mpl-2.0", "evaluate": {"new_tokens": 8}}}
    for seed, el in ((17, -20.0), (18, -22.0), (19, -24.0)):
        save_run(root, f"low-seed{seed}", with_new(el, -10.0, 0.5), seed=seed, **said.get(seed, {}))
    save_run(root, "high", with_new(-40.0, -30.0, 2.0), **{"stage1.lr": 1e-3})
    save_run(root, "other", with_new(-30.0, -20.0, -1.0), texts="b", **{"stage1.lr": 1e-2})
    return root


@pytest.fixture(scope="module")
def comparison(root: Path) -> Comparison:
    names = ["low-seed17", "high", "low-seed18", "other", "low-seed19"]
    runs = read_runs([str(root / name) for name in names])
    return compare(runs, runs[1])


def test_gain_and_loss_are_the_last_stages_changes_against_the_dense_model_and_their_means(
    comparison: Comparison,
) -> None:
    high = next(one for one in comparison.runs if one.name == "high")
    assert high.checkpoint == "stage2"
    assert {name: round(change.percent, 6) for name, change in high.new.items()} == {"el": -40.0, "tr": -30.0}
    assert {name: round(change.percent, 6) for name, change in high.old.items()} == {"en": 2.0}
    assert {name: round(change.percent, 6) for name, change in high.watch.items()} == {"en-udhr": 0.0}
    assert high.means == {"new": pytest.approx(-35.0), "old": pytest.approx(2.0)}


def test_runs_that_differ_by_seed_alone_are_one_group_with_mean_and_sample_deviation(comparison: Comparison) -> None:
    assert [(group.name, group.runs) for group in comparison.groups] == [
        ("low", ["low-seed17", "low-seed18", "low-seed19"]),
        ("high", ["high"]),
        ("other", ["other"]),
    ]
    low, high, _ = comparison.groups
    assert low.changes["el"].mean == pytest.approx(-22.0)
    assert low.changes["el"].deviation == pytest.approx(2.0)  # of -20, -22 and -24, divided by n - 1
    assert low.means["new"].deviation == pytest.approx(statistics.stdev([-15.0, -16.0, -17.0]))
    assert high.changes["el"].deviation is None
    assert low.seconds is not None and low.seconds.mean == pytest.approx(80.0)


def test_work_is_the_documented_operations_per_token_times_tokens_of_each_stage(
    comparison: Comparison, root: Path
) -> None:
    high = next(one for one in comparison.runs if one.name == "high")
    run, plan = load_run(root / "high" / "run.yaml"), ExpertPlan.load(root / "high" / "expert_plan.json")
    first, second = (flops_of_stage(CONFIG, plan, find_stage(run, number)) for number in (1, 2))
    assert first > second > 0
    assert high.flops == 4096 * first + 1024 * second
    assert high.tokens == {"stage1": 4096, "stage2": 1024}
    assert high.seconds == 80.0


def test_intervals_against_a_run_are_those_over_paired_documents(comparison: Comparison, root: Path) -> None:
    one, two = (Evaluation.load(root / name / "evaluation.json").sets["el"] for name in ("high", "low-seed17"))
    bits = [np.array(found.bits_by_document["stage2"]) for found in (one, two)]
    assert comparison.against == "high"
    assert comparison.paired["low-seed17"]["el"] == paired_change(*bits)
    assert set(comparison.paired["low-seed17"]) == set(SMALL)
    assert "high" not in comparison.paired


def test_a_run_that_scored_other_documents_has_no_interval_and_one_line_says_so(comparison: Comparison) -> None:
    assert comparison.paired["other"] == {}
    lines = [line for line in comparison.notes if line.startswith("other ")]
    assert lines == ["other has no interval on en, el, tr, en-udhr: high scored other documents there"]
    assert [line for line in comparison.notes if line.startswith("Not all runs scored the same documents of en, el,")]


def test_runs_of_other_windows_are_not_paired(tmp_path: Path) -> None:
    paths = [save_run(tmp_path, "a", SMALL), save_run(tmp_path, "b", SMALL, window=64)]
    runs = read_runs(list(map(str, paths)))
    found = compare(runs, runs[0])
    assert found.paired == {}
    assert found.notes == ["b is scored in other windows than a (evaluate.window), so it has no intervals"]


def test_without_the_models_config_flops_are_unknown_and_a_line_says_so(tmp_path: Path) -> None:
    path = save_run(tmp_path, "a", SMALL)
    (path / "upcycled" / "hf" / "config.json").unlink()
    found = compare(read_runs([str(path)]))
    assert found.runs[0].flops is None
    assert found.notes == ["FLOPs are unknown of a: the dense model's config or a stage's manifest is not there"]


def test_a_baseline_of_a_hubs_model_is_counted_by_the_config_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    changes = {"method": "full", "model.path": "maker/dense"}
    path = save_run(tmp_path, "full", {"en": 0.0, "el": -1.0, "tr": -1.0}, **changes)
    shutil.rmtree(path / "upcycled")
    (path / "expert_plan.json").unlink()
    assert compare(read_runs([str(path)])).runs[0].flops is None
    snapshots = tmp_path / "hub" / "models--maker--dense"
    CONFIG.save_pretrained(snapshots / "snapshots" / "abc")
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("abc")
    plan = ExpertPlan.dense(4, old=["en"], new=["el", "tr"])
    expected = 4096 * flops_of_stage(CONFIG, plan, find_stage(load_run(path / "run.yaml"), 1))
    assert compare(read_runs([str(path)])).runs[0].flops == expected > 0


def test_a_run_without_stage_2_shows_no_figures_of_it(tmp_path: Path) -> None:
    path = save_run(tmp_path, "a", SMALL, stage2=None)
    (path / "manifests" / "stage2.json").unlink()
    (row,) = tables(compare(read_runs([str(path)])))[1].rows
    shown = [cell.text.replace("\N{NO-BREAK SPACE}", " ") for cell in row.cells]
    assert shown[:6] == ["100.0 M", MISSING, "200.0 M", "150.0 M", "4.1 k", MISSING]


def test_two_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [save_run(tmp_path / "x", "a", SMALL), save_run(tmp_path / "y", "a", SMALL, **{"stage1.lr": 1e-3})]
    found = compare(read_runs(list(map(str, paths))))
    assert [one.name for one in found.runs] == list(map(str, paths))
    assert [group.name for group in found.groups] == list(map(str, paths))


def test_the_text_has_a_row_for_each_run_and_each_group(comparison: Comparison) -> None:
    changes, cost, against = as_text(comparison).split("\n\n")[:3]
    lines = changes.splitlines()
    assert re.split(r"\s{2,}", lines[1].strip()) == ["NEW mean", "el", "tr", "OLD mean", "en", "en-udhr"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert rows[0] == ["low, 3 seeds", "-16.0 +-1.0", "-22.0 +-2.0", "-10.0 +-0.0", "+0.5 +-0.0", "+0.5 +-0.0", "+0.0 +-0.0"]  # fmt: skip # noqa: E501
    assert rows[4] == ["high", "-35.0", "-40.0", "-30.0", "+2.0", "+2.0", "+0.0"]
    assert "200.0 M" in cost and "4.1 k" in cost and "1 min 20 s" in cost
    assert "Bits against high" in against and "high" not in {line.split()[0] for line in against.splitlines()[1:]}


def test_the_page_holds_the_picture_and_the_tables_and_loads_nothing(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text(page(comparison), encoding="utf-8")
    shown = Page(path)
    (chart,) = shown.figures
    names = [trace["name"] for trace in chart["data"] if trace.get("showlegend") is not False]
    assert names == ["low", "high", "other"]
    low, cross = chart["data"][:2]
    assert low["x"] == pytest.approx([0.5] * 3) and low["y"] == pytest.approx([15.0, 16.0, 17.0])
    assert cross["error_y"]["array"] == pytest.approx([1.0])
    policies = [attrs["content"] for _, attrs in shown.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert str(policies[0]).startswith("default-src 'none';")
    own = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", own)
    for words in ("low, 3 seeds", "−22.0 ± 2.0", "Bits against high", "FLOPs", "other has no interval"):
        assert words in own, words


def test_the_areas_of_markers_are_as_the_parameters(tmp_path: Path) -> None:
    paths = [save_run(tmp_path, "a", SMALL), save_run(tmp_path, "b", SMALL, **{"stage1.lr": 1e-3})]
    record = paths[1] / "evaluation.json"
    tree = json.loads(record.read_text())
    tree["parameters"]["total"] = 800_000_000
    record.write_text(json.dumps(tree))
    path = tmp_path / "page.html"
    path.write_text(page(compare(read_runs(list(map(str, paths))))), encoding="utf-8")
    small, large = (trace["marker"]["size"][0] for trace in Page(path).figures[0]["data"])
    assert (large / small) ** 2 == pytest.approx(4.0)


def test_html_in_names_is_escaped(tmp_path: Path) -> None:
    evil, found = "<img src=x onerror=alert(1)>", compare(read_runs([str(save_run(tmp_path, "a", SMALL))]))
    run = found.runs[0].model_copy(update={"name": evil, "group": evil, "watch": {evil: found.runs[0].new["el"]}})
    group = found.groups[0].model_copy(update={"name": evil, "runs": [evil]})
    shown = page(found.model_copy(update={"runs": [run], "groups": [group], "notes": [evil]}))
    assert "<img" not in shown.replace(get_plotlyjs(), "")
    assert "&lt;img src=x" in shown


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pipeline", "compare", *words])
    return command_line()


def test_the_command_writes_page_and_record_and_takes_folders_and_yamls(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "high.yaml"
    path.write_text(yaml.safe_dump(settings("high", output_dir=str(root))))
    assert command(monkeypatch, str(root / "low-seed17"), str(path), "--to", str(tmp_path / "out")) == 0
    assert "low-seed17" in capsys.readouterr().out
    written = Comparison.load(tmp_path / "out" / "compare.json")
    assert [one.name for one in written.runs] == ["low-seed17", "high"]
    assert (tmp_path / "out" / "compare.html").is_file()
    again = ["--against", str(root / "high") + "/", "--to", str(tmp_path / "again")]
    assert command(monkeypatch, str(root / "low-seed17"), str(path), *again) == 0
    assert [one.name for one in Comparison.load(tmp_path / "again" / "compare.json").runs] == ["low-seed17", "high"]


@pytest.mark.parametrize(
    ("runs", "folder"),
    [("a", "compare-a"), ("a b", "compare-a-b"), ("a b c", "compare-a-and-2-more")],
)
def test_by_default_it_writes_beside_the_first_run(runs: str, folder: str) -> None:
    assert default_folder([Path("runs") / name for name in runs.split()]) == Path("runs") / folder


def test_a_mistake_is_one_line_and_exit_code_2(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(root / "high")
    fewer = save_run(tmp_path, "fewer", {"en": 0.5, "el": -20.0})
    bare = save_run(tmp_path, "bare", SMALL)
    (bare / "evaluation.json").unlink()
    only_base = save_run(tmp_path, "only-base", SMALL)
    tree = json.loads((only_base / "evaluation.json").read_text())
    (only_base / "evaluation.json").write_text(json.dumps({**tree, "checkpoints": ["base"]}))
    planned = tmp_path / "planned.yaml"
    planned.write_text(yaml.safe_dump(settings("planned", output_dir=str(tmp_path / "none"))))
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[str], list[str]]] = [
        ([good, str(tmp_path)], [f"{tmp_path}: not a run's folder", "run.yaml"]),
        ([good, str(tmp_path / "nowhere")], ["nowhere: no such run"]),
        ([good, str(planned)], ["planned.yaml: has not been run", "python -m pipeline run"]),
        ([good, str(bare)], ["bare: not evaluated", "python -m pipeline run"]),
        ([good, str(only_base)], ["only-base: not evaluated"]),
        ([good, str(fewer)], ["fewer: scored on old en, new el, but", "on old en, new el, new tr"]),
        ([good, "--against", str(tmp_path / "nowhere")], ["nowhere: no such run"]),
        ([good, "--to", str(tmp_path / "file")], ["file: can't be written", "--to"]),
    ]
    for words, says in cases:
        assert command(monkeypatch, *words) == 2, words
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert all(text in lines[0] for text in says), lines[0]


def test_groups_of_one_colour_have_other_markers(comparison: Comparison) -> None:
    runs = [
        comparison.runs[0].model_copy(update={"name": f"run{number}", "group": f"run{number}"}) for number in range(13)
    ]
    groups = [comparison.groups[0].model_copy(update={"name": one.name, "runs": [one.name]}) for one in runs]
    chart = gain_against_forgetting(comparison.model_copy(update={"runs": runs, "groups": groups}))
    drawn = [trace.marker for trace in chart.data if trace.showlegend is not False]
    assert len({marker.color for marker in drawn}) < len(drawn)
    assert len({(marker.color, marker.symbol) for marker in drawn}) == len(drawn) == 13

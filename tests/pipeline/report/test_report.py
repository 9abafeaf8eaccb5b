"""The report of a run: python -m pytest tests/pipeline/report/test_report.py"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from common.errors import UserError
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.metrics import StepRow
from pipeline.records.run_folder import RunFolder
from pipeline.report.curves import MAX_POINTS, running_mean, series
from pipeline.report.data import read_run
from pipeline.report.page import write_page
from pipeline.run.steps import STEP_NAMES
from tests.helpers.report_run import CLASSIFIERS, COUNTS, RUN_YAML, make_run

SECTIONS = ["results", "experts", "stage1", "stage2", "validation", "routing", "steps", "settings"]


class Page(HTMLParser):
    """A report, taken apart: its text, its figures, every tag's attributes, and each section's text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.scripts: list[str] = []
        self._section, self._raw = "head", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.figures: list[Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            text = self.texts.get(self._section, "") + data.replace("\N{NO-BREAK SPACE}", " ")
            self.texts[self._section] = re.sub(r"\s+", " ", text)

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def traces(self, kind: str) -> list[dict[str, Any]]:
        """Every figure's traces of one type."""
        return [trace for figure in self.figures for trace in figure["data"] if trace["type"] == kind]


def write_report(folder: Path) -> Path:
    """Write a run's report; returns its path."""
    write_page(RunFolder(folder), STEP_NAMES)
    return folder / "report.html"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Page:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return Page(path)


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    """A run folder that a test may change."""
    return shutil.copytree(run_folder, tmp_path / "copy")


def test_every_section_is_present_and_every_figure_has_its_place(page: Page) -> None:
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    # One sentence only is for what is missing: the one for readers without JavaScript.
    assert sum(attrs.get("class") == "missing" for _, attrs in page.tags) == 1
    places = [
        attrs["id"] for tag, attrs in page.tags if tag == "div" and str(attrs.get("id", "")).startswith("chart-")
    ]
    assert places == [f"chart-{index}" for index in range(len(page.figures))]
    for figure in page.figures:
        assert figure["data"], figure["layout"]
    pictures = sum(tag == "figure" for tag, _ in page.tags)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == pictures == 21


def test_a_further_expansion_names_the_run_it_starts_from_and_what_each_round_added(copy: Path) -> None:
    (copy / "run.yaml").write_text(f"base: {{run: runs/g1}}\n{RUN_YAML}")
    first = ExpertPlan.load(copy / "expert_plan.json")
    plan = first.expand([1] * 30, languages=["bn"], classifier_layers=CLASSIFIERS)
    plan.save(copy / "expert_plan.json")
    page = Page(write_report(copy))
    assert "Base run runs/g1" in page.texts["head"] and "against base" in page.texts["head"]
    assert "characters basestage 1stage 2" in page.texts["results"]
    assert "Round 1: el, hu, tr; " in page.texts["experts"]
    assert "Round 2: bn; 30 new experts in 30 layers, copies of the original MLP." in page.texts["experts"]


def test_nothing_is_loaded_from_elsewhere(run_folder: Path, page: Page) -> None:
    policies = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies and str(policies[0]).startswith("default-src 'none';") and "http" not in str(policies[0])
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed"), tag
        assert not {"src", "href", "srcset", "data"} & attrs.keys(), (tag, attrs)
    own = (run_folder / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", own)
    assert not {trace["type"] for figure in page.figures for trace in figure["data"]} - {"bar", "scatter", "heatmap"}


def test_the_headline_and_the_table_say_what_was_measured(page: Page) -> None:
    head, table = page.texts["head"], page.texts["results"]
    assert "Taught el, hu, tr" in head and "Knew en" in head and "inputs/smollm2-135m" in head
    assert "the new languages take 35.3 % fewer bits per character (el −43.9 %, hu −35.6 %, tr −26.4 %)" in head
    assert "the old language en takes 3.5 % fewer bits per character" in head
    assert "293.8 M" in head and "the dense model has 134.5 M" in head
    for value in ("2.743", "1.526", "1.539", "−43.9 % ± 1.1", "0.887", "0.856", "3.280", "70,123"):
        assert value in table, value
    assert "−11.6 % ±" not in table  # one document: no interval
    assert table.index("New languages") < table.index("Old languages") < table.index("Watched")


def test_the_pictures_show_the_files_numbers(page: Page) -> None:
    bars = page.traces("bar")
    assert [bar["y"] for bar in bars] == [[1] * 30, [count - 1 for count in COUNTS]]
    scatters = {trace["name"]: trace for trace in page.traces("scatter") if "name" in trace}
    assert scatters["routing classifier"]["x"] == CLASSIFIERS
    assert len(scatters["S, which experts are allocated by"]["y"]) == 30
    pairs = [trace["name"] for trace in page.traces("scatter") if "with" in trace.get("name", "")]
    assert (
        sorted(pairs) == ["new with new"] * 3 + ["new with old"] * 3 and scatters["not in S"]["line"]["dash"] == "dot"
    )
    best = scatters["best checkpoint"]
    assert best["text"] == ["best of stage 1: step 60", "best of stage 2: step 65"]
    assert best["x"] == [60 * 2048, 73 * 2048 + 65 * 512]
    maps = page.traces("heatmap")
    assert len(maps) == 5 and all(trace["y"] == ["el", "hu", "tr", "en", "en-udhr", "el-udhr"] for trace in maps)
    for first, second in (maps[:2], maps[2:4]):
        assert (first["zmin"], first["zmax"]) == (second["zmin"], second["zmax"])
        assert first["z"] != second["z"]
    assert maps[4]["x"] == [str(layer) for layer in CLASSIFIERS]


def test_steps_versions_and_settings_are_shown(page: Page) -> None:
    assert "6 min 42 s" in page.texts["steps"] and "torch 2.13.0" in page.texts["steps"]
    assert page.texts["steps"].index("tokenize") < page.texts["steps"].index("stage1")
    assert "61 new experts, one over the budget" in page.texts["steps"]
    assert "lr: 5.0e-4" in page.texts["settings"]


def test_a_run_without_stage_2_says_so_and_shows_the_rest(copy: Path) -> None:
    shutil.rmtree(copy / "stage2")
    page = Page(write_report(copy))
    assert "Stage 2 has not run yet: stage2/metrics.jsonl holds no step." in page.texts["stage2"]
    assert "Next-token loss" in page.texts["stage1"] and "Bits per character by set" in page.texts["validation"]
    (copy / "run.yaml").write_text(RUN_YAML[: RUN_YAML.index("stage2:")])
    assert "This run has no stage 2: stage2 is not in its run.yaml." in Page(write_report(copy)).texts["stage2"]


def test_the_ranks_that_others_waited_for_are_named(copy: Path, page: Page) -> None:
    metrics = copy / "stage1" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row, percent in zip(rows, (12.0, 18.0, 40.0), strict=False):
        row["slowest_rank"] = {"rank": 59, "host": "node7", "percent": percent}
    rows[3]["slowest_rank"] = {"rank": 2, "host": "node0", "percent": 11.0}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = f"node7:59 in 3 of {len(rows)} steps (median +18 %), node0:2 in 1 of {len(rows)} steps (median +11 %)."
    assert said in Page(write_report(copy)).texts["stage1"]
    assert "slowest rank" not in page.texts["stage1"] + page.texts["stage2"]


def test_a_run_that_has_only_begun_has_a_sentence_in_place_of_each_picture(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    page = Page(write_report(tmp_path))
    assert page.figures == []
    assert "has not been evaluated yet" in page.texts["head"] and "has not been evaluated yet" in page.texts["results"]
    assert "expert_plan.json is not in the folder" in page.texts["experts"]
    assert "similarity.json is not in the folder" in page.texts["experts"]
    assert "Stage 1 has not run yet" in page.texts["stage1"]
    assert "Training has not begun" in page.texts["validation"]
    assert "No routing was measured" in page.texts["routing"]
    assert "No step has finished" in page.texts["steps"]


def test_html_in_names_and_settings_is_escaped(copy: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    (copy / "run.yaml").write_text(f'name: "{evil}"\nmodel: {{path: "</script><b>&"}}\nstage1: {{}}\nstage2: {{}}\n')
    evaluation = json.loads((copy / "evaluation.json").read_text())
    evaluation["sets"] = {evil if name == "el" else name: value for name, value in evaluation["sets"].items()}
    for routing in evaluation["routing"].values():
        routing["sets"][evil] = routing["sets"].pop("el")
    (copy / "evaluation.json").write_text(json.dumps(evaluation))
    path = write_report(copy)
    page = Page(path)
    assert all(tag != "img" for tag, _ in page.tags)
    assert evil in page.texts["head"] and evil in page.texts["results"] and "</script><b>&" in page.texts["settings"]
    assert page.traces("heatmap")[0]["y"][0] == "&lt;img src=x onerror=alert(1)&gt;"
    assert "<img" not in path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def test_a_long_run_is_thinned_to_means_that_keep_the_average() -> None:
    rows = [
        StepRow(
            step=n,
            samples=n,
            tokens=10 * n,
            loss={"next_token": float(n)},
            expert_0_share={},
            load_imbalance=[],
            lr=1.0,
            grad_norm=1.0,
            skipped=None,
            tokens_per_second=1.0,
            memory_gb=1.0,
            seconds=1.0,
        )  # fmt: skip
        for n in range(1, 6001)
    ]
    thinned = series(rows, lambda row: row.loss["next_token"])
    assert len(thinned.values) == MAX_POINTS and thinned.steps_per_point == 10
    assert thinned.values[0] == 5.5 and thinned.tokens[-1] == 60000
    assert sum(thinned.values) / MAX_POINTS == pytest.approx(3000.5)
    assert series([], lambda row: row.lr).values == [] and running_mean([]) == []


def test_a_folder_without_a_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: can't be read .*name a run's folder"):
        write_report(tmp_path)


def test_a_damaged_file_is_named(copy: Path) -> None:
    damaged = copy / "evaluation.json"
    damaged.write_text('{"window": 1024, "checkpoints": [], "sets": {"el": {"group": "news"}}}')
    with pytest.raises(UserError, match=r"evaluation\.json: sets\.el\.group"):
        read_run(RunFolder(copy), STEP_NAMES)
    damaged.unlink()
    (copy / "stage1" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line [0-9]+: damaged"):
        read_run(RunFolder(copy), STEP_NAMES)


def test_the_report_is_written_in_one_piece(copy: Path) -> None:
    (copy / "report.html").write_text("an older report")
    write_report(copy)
    assert [path.name for path in copy.glob("*report*")] == ["report.html"]
    assert (copy / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")

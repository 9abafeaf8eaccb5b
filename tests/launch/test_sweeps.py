"""The ready sweeps parse, and each of their runs is what its name says. Run: pytest tests/launch/test_sweeps.py"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run import RunConfig
from pipeline.method.allocation import allocate, expert_plan
from pipeline.method.stages import stages_of
from pipeline.run.changes import differences
from pipeline.run.steps import STEPS
from pipeline.sweep.config import Sweep, read_sweep
from tests.launch.test_commands import ROOT

LAYERS = 30  # of SmolLM2-135M
SIMILARITY = [0.12 + 0.016 * layer for layer in range(LAYERS)]
BASELINES = {"full", "full-replay", "lora", "llama-pro"}
# By name, all that differs from the quickstart.
ENTRIES: dict[str, dict[str, Any]] = {
    "layerwise": {},
    "uniform": {"experts.allocation": "uniform"},
    "mola": {"experts.allocation": "mola", "experts.num_new": None},
    "layerwise-40": {"experts.num_new": 24},
    "no-lpr": {"stage2.lpr_weight": 0.0},
    "no-classifiers": {"experts.classifier_layers": 0},
    "no-review": {"stage2": None},
    "router-kl": {"stage2.router_kl_weight": 1.0},
    "drop-upcycling": {"experts.init": "drop"},
    "full": {"method.name": "full", "parallel.ep_size": 1},
    "full-replay": {"method.name": "full", "parallel.ep_size": 1, "stage1.old_share": 0.25},
    "lora": {
        "method.name": "lora", "method.rank": 16, "method.alpha": 32, "method.dropout": 0.0, "method.targets": "all",
        "parallel.ep_size": 1,
    },
    "llama-pro": {"method.name": "llama_pro", "method.blocks": 8, "parallel.ep_size": 1},
}  # fmt: skip


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(ROOT)
    return read_sweep(ROOT / "launch" / "sweeps" / "baselines.yaml")


def entry_of(run: RunConfig) -> str:
    return run.name.removeprefix("quickstart-").rpartition("-seed")[0]


def test_every_ready_sweep_is_tested_here() -> None:
    assert [path.name for path in (ROOT / "launch" / "sweeps").iterdir()] == ["baselines.yaml"]


def test_there_are_three_seeds_of_each_entry_and_nothing_else_differs(sweep: Sweep) -> None:
    assert [entry_of(run) for run in sweep.runs] == [*ENTRIES] * 3
    assert [run.seed for run in sweep.runs] == [seed for seed in (17, 18, 19) for _ in ENTRIES]
    base = sweep.base.model_dump(mode="json", by_alias=True)
    for run in sweep.runs:
        changes = differences(base, run.model_dump(mode="json", by_alias=True))
        found = {change.key: change.now for change in changes if change.key not in ("name", "seed", "data.seed")}
        assert found == ENTRIES[entry_of(run)], run.name


def test_all_runs_prepare_the_same_text(sweep: Sweep) -> None:
    prepared = {run.preparation.model_copy(update={"seed": 0}).model_dump_json() for run in sweep.runs}
    assert len(prepared) == 1 and all(run.data.seed == 17 for run in sweep.runs)
    assert sweep.base.data.replay is None  # all of the old text, for a quarter of stage 1 too


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_the_steps_experts_and_losses_that_its_name_says(sweep: Sweep, name: str) -> None:
    run = next(run for run in sweep.runs if entry_of(run) == name)
    steps = [step.name for step in STEPS if step.applies(run)]
    stages = stages_of(run)
    if name in BASELINES:
        assert steps == ["tokenize", "stage1", "evaluate", "report"]
        assert stages[0].shares() == ({"old": 0.25, "new": 0.75} if name == "full-replay" else {"new": 1.0})
        return
    reviewed = ["stage1", *([] if name == "no-review" else ["stage2"])]
    assert steps == ["tokenize", "similarity", "allocate", "upcycle", *reviewed, "evaluate", "report"]
    assert [stage.name for stage in stages] == reviewed
    plan = expert_plan(run, allocate(run.experts, LAYERS, SIMILARITY).counts, SIMILARITY)
    assert sum(plan.num_new) == pytest.approx({"mola": 120, "layerwise-40": 24}.get(name, 60), abs=3)  # of ceil
    assert (len(set(plan.counts)) == 1) == (name == "uniform")
    assert len(plan.classifier_layers) == (0 if name == "no-classifiers" else 7)


def test_a_sweep_of_baselines_is_done_from_the_repository(sweep: Sweep) -> None:
    assert sweep.base.name == "quickstart" and sweep.comparison == Path("runs/compare-baselines")

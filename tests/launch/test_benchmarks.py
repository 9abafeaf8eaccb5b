"""The benchmarks of computing run, at tiny sizes, and say what they are to say; what they measure is not looked at.

Run: pytest tests/launch/test_benchmarks.py
"""

import json
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

from benchmarks import step_models
from benchmarks.measuring import CPU, WALL, Turn, in_turns, ratio
from benchmarks.step_blocks import TwoDense, TwoDenseAsRouted
from benchmarks.step_engine import kept_bytes
from benchmarks.step_models import Bench, Sizes, floor
from benchmarks.step_ranks import PARTS, FunctionTimes
from benchmarks.step_run import run_config
from pipeline.method.stages import find_stage
from tests.launch.test_commands import command

TINY = ["--layers", "2", "--hidden", "24", "--intermediate", "32", "--heads", "3", "--vocab", "50", "--tokens", "32",
        "--sequence", "16"]  # fmt: skip
SIZES = Sizes(layers=2, hidden=24, intermediate=32, heads=3, vocab=50, experts=4, tokens=32, sequence=16)
CPU_DEVICE = torch.device("cpu")


@pytest.mark.slow
def test_train_step_has_a_row_for_each_contender_and_part(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.train_step", *TINY, "--rounds", "1", "--dtypes", "bf16"]
    output = command(*words, "--json", str(tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())["results"]["bf16"]
    models, step = (
        found[title] for title in ("forward + backward, x its floor", "a step of stage 1, x the floor with AdamW")
    )
    assert len(models) == 9 and len(step) == 8
    for row in (*models, *step):
        assert row["ms"] > 0 and row["wall"] > 0 and row["cpu"] > 0
        assert row["name"] in output
    assert set(found["memory"]) == {"peak", "weights", "gradients", "moments", "activations"}
    assert all(value > 0 for value in found["memory"].values())


@pytest.mark.slow
def test_train_step_compares_ep_sizes_under_deepspeeds_launcher(tmp_path: Path) -> None:
    words = ["deepspeed", "--num_gpus", "2", "--module", "benchmarks.train_step", "--ep", *TINY, "--rounds", "1"]
    command(*words, "--experts", "5", "--dtypes", "fp32", "--json", str(tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())["results"]["fp32"]
    assert set(found["parts"]) == {"1", "2"}
    sent = {
        "counts: exchange and plan", "dispatch: begun", "combine: rows sent back",
        "backward: gradients begun to be sent",
    }  # fmt: skip
    waits = {"dispatch: until all rows are here, sorted", "backward: until all gradients are here", "waiting"}
    assert sent | waits <= {*PARTS.values(), "waiting"}
    for part in {*PARTS.values(), "waiting"}:
        assert found["parts"]["2"][part] > 0, part
        assert (found["parts"]["1"][part] > 0) == (part not in sent | waits), part


@pytest.mark.slow
def test_moe_layer_has_a_row_for_each_contender(tmp_path: Path) -> None:
    sizes = ["--tokens", "32", "--hidden", "16", "--intermediate", "24", "--rounds", "1", "--dtypes", "fp32"]
    words = [sys.executable, "-m", "benchmarks.moe_layer", *sizes, "--json", str(tmp_path / "figures.json")]
    output = command(*words)
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert len(rows) == 8
    for row in rows:
        assert row["name"] in output
        assert row["forward_wall_ms"] > 0 and row["both_wall_ms"] > 0


@pytest.mark.slow
def test_generate_has_a_row_for_each_way_to_compute_experts(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    sizes = ("--layers", "2", "--hidden", "24", "--intermediate", "40", "--heads", "2", "--kv-heads", "1",
             "--vocabulary", "64", "--prompt", "4", "--new-tokens", "3", "--rounds", "1")  # fmt: skip
    output = command(sys.executable, "-m", "benchmarks.generate", *sizes, "--dtypes", "fp32", "--json", str(path))
    rows = {row["name"]: row for row in json.loads(path.read_text())["results"]}
    ways = ("eager", "batched_mm", "grouped_mm")
    assert list(rows) == ["dense", *(f"{name}, {way}" for name in ("top 2", "expert 0 by classifier") for way in ways)]
    assert rows["dense"]["wall_ratio"] == rows["dense"]["cpu_ratio"] == 1.0
    for name, row in rows.items():
        assert row["step_ms"] > 0 and row["wall_ratio"] > 0
        assert name in output


def test_grouped_mm_has_a_row_for_each_number_of_experts_and_rows(tmp_path: Path) -> None:
    sizes = ["--hidden", "16", "--intermediate", "24", "--experts", "2", "3", "--rows", "4", "9", "--rounds", "1"]
    command(sys.executable, "-m", "benchmarks.grouped_mm", *sizes, "--json", str(tmp_path / "figures.json"))
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(row["experts"], row["rows"]) for row in rows] == [(2, 4), (2, 9), (3, 4), (3, 9)]
    for row in rows:
        assert row["forward_ms"] > 0 and row["both_ratio"] > 0
        assert row["largest_difference"] < 1e-2


@pytest.mark.slow
def test_stage1_sets_what_it_holds_beside_the_estimate(tmp_path: Path) -> None:
    words = [*TINY, "--experts", "3", "--rounds", "1", "--dtypes", "bf16", "--json", str(tmp_path / "figures.json")]
    output = command(sys.executable, "-m", "benchmarks.stage1", *words)
    kept, again = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert again["estimate"]["activations"] < kept["estimate"]["activations"]
    for found in (kept, again):
        assert found["name"] in output
        assert found["peak"] > 0 and found["seconds"] > 0 and found["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tokens", "33"], "--tokens 33: give a multiple of --sequence 16"),
        *(
            pytest.param(words, line, marks=pytest.mark.slow)
            for words, line in (
                (["--heads", "5"], "--hidden 24: give an even multiple of --heads 5"),
                (["--experts", "1"], "--experts 1: give at least 2, the floors are two MLPs"),
                (["--rounds", "0"], "--rounds 0: give at least 1"),
                (["--ep"], "--ep: start it with deepspeed --num_gpus 2 --module benchmarks.train_step --ep"),
            )
        ),
    ],
)
def test_a_bad_option_of_train_step_is_one_line(words: list[str], line: str) -> None:
    output = command(sys.executable, "-m", "benchmarks.train_step", *TINY, *words, code=2)
    assert output.splitlines()[-1] == f"python -m benchmarks.train_step: error: {line}"


def test_turns_move_on_and_the_first_rounds_do_not_count() -> None:
    ran: list[str] = []
    turns = [Turn(name, {"a": lambda n=name: ran.append(n)}) for name in "xyz"]
    times = in_turns(turns, 3, CPU_DEVICE, "")
    assert "".join(ran) == "yzxzxyxyzyzxzxy"
    assert {name: len(parts["a"]) for name, parts in times.items()} == {"x": 3, "y": 3, "z": 3}


def test_ratio_is_the_median_of_each_rounds_own() -> None:
    mine, floor_times = [(2.0, 9.0), (3.0, 1.0), (40.0, 2.0)], [(1.0, 3.0), (1.0, 1.0), (10.0, 1.0)]
    assert ratio(mine, floor_times, WALL) == 3.0
    assert ratio(mine, floor_times, CPU) == 2.0


def test_a_function_s_own_time_is_without_that_of_the_timed_functions_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 3.0, 7.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr("benchmarks.step_ranks.time.perf_counter", lambda: next(clock))

    def inner() -> FrameType | None:
        return None

    def outer() -> None:
        inner()

    times = FunctionTimes(frozenset({inner.__qualname__, outer.__qualname__}))
    with times.taken():
        outer()
    assert dict(times.own) == {inner.__qualname__: 1.0, outer.__qualname__: 6.0}
    assert dict(times.calls) == {inner.__qualname__: [(2.0, 3.0)], outer.__qualname__: [(0.0, 7.0)]}


def test_the_loop_over_experts_computes_what_our_layer_does() -> None:
    bench = Bench(SIZES, torch.float32, CPU_DEVICE)
    stage = find_stage(run_config(SIZES, "fp32", 1, Path("none")), 1)
    loop, ours = step_models.loop(bench, "floor", stage).blocks[0], step_models.ours(bench, "", "", stage, 0).blocks[0]
    with torch.no_grad():
        for theirs, mine in zip(list(loop.experts)[1:], ours.local_experts.experts, strict=True):
            gate, up = mine.gate_up_proj.chunk(2)
            theirs.gate_proj.weight.copy_(gate)
            theirs.up_proj.weight.copy_(up)
            theirs.down_proj.weight.copy_(mine.down_proj)
        x = torch.randn(2, 16, 24)
        torch.testing.assert_close(loop(x), ours(x))


def test_the_floor_as_routed_computes_two_rows_per_token() -> None:
    x = torch.randn(2, 5, 8)
    same = torch.nn.Linear(8, 8)
    torch.testing.assert_close(TwoDenseAsRouted(same, same, 3)(x), TwoDense(same, same)(x))


def test_the_floor_s_kept_bytes_grow_with_the_tokens_alone() -> None:
    def kept(tokens: int) -> int:
        sizes = Sizes(**{**SIZES.__dict__, "tokens": tokens})
        bench = Bench(sizes, torch.float32, CPU_DEVICE)
        return kept_bytes(bench, floor(bench, "floor", "one MLP"))

    first, second, third = (kept(tokens) for tokens in (16, 32, 48))
    assert first > 16 * (3 * SIZES.intermediate + SIZES.vocab) * 4
    assert third - second == pytest.approx(second - first, rel=0.02)

"""What runs a sweep makes of its base. Run: pytest tests/pipeline/sweep/test_config.py"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from pipeline.cli.main import command_line
from pipeline.sweep.config import Sweep, read_sweep
from tests.helpers.compared_runs import settings


def save(folder: Path, *, of: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A sweep and its base."""
    (folder / "base.yaml").write_text(yaml.safe_dump(of or settings("base", output_dir=str(folder / "runs"))))
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump({"base": str(folder / "base.yaml"), **keys}, sort_keys=False))
    return path


def read(folder: Path, **keys: Any) -> Sweep:
    return read_sweep(save(folder, **keys))


def test_there_is_a_run_for_each_override_and_seed_with_a_derived_name_and_one_cache(tmp_path: Path) -> None:
    sweep = read(tmp_path, runs={"low": {"stage1.lr": 1e-4}, "same": None}, seeds=[18, 19])
    assert [run.name for run in sweep.runs] == [
        "base-low-seed18", "base-same-seed18", "base-low-seed19", "base-same-seed19",
    ]  # fmt: skip
    assert [run.seed for run in sweep.runs] == [18, 18, 19, 19]
    assert [run.stage1.lr for run in sweep.runs] == [1e-4, sweep.base.stage1.lr] * 2
    assert {run.output_dir for run in sweep.runs} == {tmp_path / "runs"}
    assert {run.cache_dir for run in sweep.runs} == {sweep.base.cache_dir}
    assert sweep.comparison == tmp_path / "runs" / "compare-rates"


def test_runs_of_several_seeds_share_the_bases_text_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    own = read(tmp_path, runs={"a": {}, "b": {"data.seed": 5}}, seeds=[18])
    assert [run.data.seed for run in own.runs] == [17, 5]
    given = read(tmp_path, of=settings("base", **{"data.seed": 4}), runs={"a": {}}, seeds=[18])
    assert [run.data.seed for run in given.runs] == [4]


def test_without_seeds_a_run_keeps_the_bases(tmp_path: Path) -> None:
    (run,) = read(tmp_path, runs={"a": {"stage2": None}}).runs
    assert (run.name, run.seed, run.data.seed, run.stage2) == ("base-a", 17, None, None)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"runs": {"low": {"stage1.learning_rate": 1}}}, ["runs.low: stage1.learning_rate: unknown key"]),
        ({"runs": {"a": {}, "low": {"stage1.lr": "fast"}}}, ["runs.low: stage1.lr: 'fast' is not allowed"]),
        ({"runs": {"low": {"seed.lr": 1}}}, ["runs.low: seed.lr: seed holds 17, which has no keys of its own"]),
        ({"runs": {"low": {"stage1..lr": 1}}}, ["runs.low: 'stage1..lr' is not a key"]),
        ({"runs": {"low": {"name": "x"}}}, ["runs.low: name is made from the base's name"]),
        ({"runs": {"low": {"seed": 3}}}, ["runs.low: seed is given by seeds"]),
        ({"runs": {"low": {"cache_dir": "x"}}}, ["runs.low: cache_dir is the base's"]),
        ({"runs": {"lo/w": {}}}, ["runs.lo/w: the name becomes part of a folder's"]),
        ({"runs": {}}, ["runs: no run"]),
        ({"runs": {"low": {}}, "seeds": [17, 17]}, ["seeds: [17, 17] are not different"]),
        ({"runs": {"low": {}}, "seed": [17]}, ["seed: unknown key; did you mean seeds?"]),
        ({"runs": {"low": {}}, "base": "none.yaml"}, ["none.yaml: can't be read"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_run_and_the_key(
    tmp_path: Path, keys: dict[str, Any], says: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = save(tmp_path, of=settings("base", seed=17), **keys)
    monkeypatch.setattr("sys.argv", ["pipeline", "sweep", str(path)])
    assert command_line() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert all(words in lines[0] for words in says), lines[0]
    assert "none.yaml" in lines[0] or str(path) in lines[0]


def test_the_base_alone_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.yaml: stage1\.tokens: 3 is not allowed|base\.yaml: stage1"):
        read(tmp_path, of=settings("base", **{"stage1.tokens": 3}), runs={"low": {"stage1.tokens": 4096}})

"""Steps with a bad loss or gradient are skipped on all ranks alike. Run: pytest tests/distributed/test_bad_steps.py"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.store import complete_tags
from pipeline.records.record import read_rows
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_with_bad_steps, with_parallel
from tests.helpers.tiny import prepared_run, run_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bad_steps")
    prepared_run(folder)
    return with_parallel(run_tree(folder), ranks=2, ep_size=2, micro_batch_size=2)


def same(ours: Any, theirs: Any) -> bool:
    values = (
        zip(ours.values(), theirs.values(), strict=True) if isinstance(ours, dict) else zip(ours, theirs, strict=True)
    )
    return all(torch.equal(a, b) for a, b in values)


KINDS = {"nan": math.nan, "inf": math.inf, "spike": 1e6}
QUICK = [("nan", 1, "fp32"), ("inf", 2, "bf16"), ("spike", 1, "bf16")]
BAD_STEPS = [
    pytest.param(KINDS[kind], number, precision, id=f"{kind}-stage{number}-{precision}",
                 marks=[] if (kind, number, precision) in QUICK else [pytest.mark.slow])
    for kind, number, precision in itertools.product(KINDS, (1, 2), ("fp32", "bf16"))
]  # fmt: skip


@pytest.mark.parametrize(("factor", "number", "precision"), BAD_STEPS)
def test_a_bad_step_of_one_rank_is_skipped_by_all_and_changes_nothing(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int, precision: str, factor: float
) -> None:
    tree |= {"deepspeed": f"ds_configs/{precision}_zero1.json", "bad_steps": {"norm_factor": 50, "window": 8}}
    good = pools[2].run(train_with_bad_steps, tree, number, tmp_path / "good", {})
    bad = pools[2].run(train_with_bad_steps, tree, number, tmp_path / "bad", {4: factor})
    for ours, clean in zip(bad, good, strict=True):
        assert same(ours["weights"][2], clean["weights"][2])
        assert same(ours["weights"][3], ours["weights"][2]), "the bad step changed weights"
        assert same(ours["moments"][3], ours["moments"][2]), "the bad step changed moments"
        assert not same(ours["weights"][4], ours["weights"][3]), "training did not continue"
        assert all(torch.isfinite(tensor).all() for tensor in ours["weights"][-1].values())
        assert ours["figures"]["skipped_steps"] == 1
        assert clean["figures"]["skipped_steps"] == 0
    rows, clean_rows = read_rows(tmp_path / "bad" / "metrics.jsonl"), read_rows(tmp_path / "good" / "metrics.jsonl")
    assert [bool(row["skipped"]) for row in rows] == [False, False, False, True, False, False]
    assert ("not finite" if factor != 1e6 else "is above") in rows[3]["skipped"]
    assert [row["lr"] for row in rows] == [row["lr"] for row in clean_rows]
    assert [row["samples"] for row in rows] == [row["samples"] for row in clean_rows]


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_the_first_step_may_be_bad(pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int) -> None:
    result = pools[2].run(train_with_bad_steps, tree, number, tmp_path, {1: math.nan})[0]
    assert result["figures"]["skipped_steps"] == 1
    assert not same(result["weights"][1], result["weights"][0])


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint_and_it_can_go_on(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree |= {"bad_steps": {"stop_after": 2}}
    first = pools[2].run(train_with_bad_steps, tree, 1, tmp_path, {3: math.nan, 4: math.nan})
    assert all("2 steps in a row were skipped" in line and "stopped after step 4" in line for line in first)
    assert complete_tags(tmp_path) == ["step000004"]
    again = pools[2].run(train_with_bad_steps, tree, 1, tmp_path, {})[0]
    assert (again["figures"]["steps"], again["figures"]["skipped_steps"]) == (6, 2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]

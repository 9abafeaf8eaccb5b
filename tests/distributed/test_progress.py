"""The progress bar of training moves by micro-step. Run: pytest tests/distributed/test_progress.py"""

from pathlib import Path

import pytest

from tests.distributed.conftest import Pools
from tests.distributed.stages import lines_of_progress
from tests.helpers.tiny import prepared_run, run_tree

STEPS, BATCH, LENGTH = 4, 8, 32
MICRO_STEPS = (3, 3, 2)  # samples of three ranks and a batch of eight


def counts(lines: list[str]) -> list[int]:
    return [int(line.split()[2].partition("/")[0].replace(",", "")) for line in lines]


@pytest.mark.slow
def test_it_counts_every_micro_step_of_an_undivided_batch_and_ends_at_the_total_also_after_a_resume(
    pools: Pools, tmp_path: Path
) -> None:
    changes = {"parallel": {"ranks": 3, "ep_size": 3, "micro_batch_size": 1},
               "stage1": {"tokens": STEPS * BATCH * LENGTH}}  # fmt: skip
    prepared_run(tmp_path, **changes)
    tree = run_tree(tmp_path, **changes)
    samples = [sum(MICRO_STEPS[: micro + 1]) + BATCH * step for step in range(STEPS) for micro in range(3)]
    tokens = [LENGTH * number for number in samples]
    first, *others = pools[3].run(lines_of_progress, tree, 1, tmp_path / "stopped", 2)
    assert others == [[], []]
    again = pools[3].run(lines_of_progress, tree, 1, tmp_path / "stopped")[0]
    total = STEPS * BATCH * LENGTH
    assert all(line.startswith("stage 1: ") and f"/{total:,} tokens, " in line for line in first + again)
    assert counts(first) == [*tokens[:6], tokens[5]]
    assert counts(again) == [*tokens[6:11], total]

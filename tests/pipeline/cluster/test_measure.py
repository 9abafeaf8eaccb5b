"""What check.sh warns of. Run: pytest tests/pipeline/cluster/test_measure.py"""

from pathlib import Path

import pytest

from pipeline.cluster.check import crossing_groups
from pipeline.cluster.measure import find_slow, speed_table
from tests.helpers.tiny import parse_run, run_tree

NAMES = ["a", "a", "b", "b"]


def speeds(*products: float) -> list[dict[str, float]]:
    return [{"matrix product": product, "memory": 100.0} for product in products]


def test_a_rank_much_slower_than_the_median_is_named_with_its_node() -> None:
    assert find_slow(NAMES, speeds(10.0, 9.0, 10.0, 11.0)) == []
    slow = speeds(10.0, 10.0, 10.0, 6.0)
    assert find_slow(NAMES, slow) == ["matrix product: rank 3 on b is slow, 60% of the median rank"]
    assert speed_table(NAMES, slow)[1:] == [["a", "10 TFLOPS", "100 GB/s"], ["b", "6 TFLOPS", "100 GB/s"]]


@pytest.mark.parametrize(("ep_size", "crossing"), [("auto", 0), (1, 0), (2, 0), (4, 1)])
def test_expert_parallel_groups_that_leave_a_node_are_counted(tmp_path: Path, ep_size: int, crossing: int) -> None:
    run = parse_run(run_tree(tmp_path, parallel={"ep_size": ep_size}), "tiny.yaml")
    lines = crossing_groups(NAMES, run)
    assert len(lines) == crossing
    assert all(
        line.startswith("parallel.ep_size 4: 1 of 1 expert-parallel groups lie on several nodes") for line in lines
    )
    assert crossing_groups(NAMES, None) == []

"""launch/check.sh on two nodes. Run: pytest tests/cluster/test_check.py"""

import re
from pathlib import Path

from tests.cluster.cluster import Cluster


def test_check_shows_nodes_and_bandwidth(cluster: Cluster) -> None:
    output = cluster.run("srun", "--nodes=2", "launch/check.sh", "--megabytes", "4")
    assert "2 ranks on 2 nodes" in output
    for node in ("node1", "node2"):
        assert re.search(rf"^{node} +1 .* CPU +gloo .*2\.13\.0", output, re.M)
        assert re.search(rf"^{node} +[\d.]+ TFLOPS +\d+ GB/s$", output, re.M)
    rates = re.findall(r"^(\d) MB +([\d.]+) GB/s +([\d.]+) GB/s +- +([\d.]+) GB/s$", output, re.M)
    assert [size for size, *_ in rates] == ["1", "4"]
    assert all(float(rate) > 0 for row in rates for rate in row[1:])
    assert "all nodes agree" in output


def test_check_calls_out_a_node_that_differs(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("0 env OMP_NUM_THREADS=1 bash launch/check.sh --megabytes 1\n"
                                    "1 env OMP_NUM_THREADS=3 bash launch/check.sh --megabytes 1\n")  # fmt: skip
    done = cluster.attempt("srun", "--nodes=2", "--multi-prog", str(tmp_path / "nodes"))
    assert done.returncode == 1
    assert "MISMATCH threads: node2 has 3, node1 has 1" in done.stdout

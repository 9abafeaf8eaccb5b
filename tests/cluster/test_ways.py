"""Seven ways to start the same training, on a real cluster. Run: pytest tests/cluster/test_ways.py"""

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, wait_for
from tests.cluster.runs import copy_run, losses, rank_rows, samples_of_ranks, write_cluster_run

WAYS = {
    "bash": "bash launch/train.sh",
    "deepspeed": "deepspeed --num_gpus 2 launch/train.sh",
    "deepspeed-pdsh": "deepspeed --hostfile {hosts} launch/train.sh",
    "deepspeed-openmpi": "deepspeed --hostfile {hosts} --launcher openmpi launch/train.sh",
    "mpirun": "mpirun --hostfile {hosts} -np 2 -x PATH launch/train.sh",
    "srun": "srun --nodes=2 launch/train.sh",
    "sbatch": "sbatch --nodes=2 --output={folder}/sbatch.log launch/train.sh",
}
QUICK = ("bash", "mpirun")  # test_submit.py trains by sbatch
ON_ONE_NODE = ("bash", "deepspeed")
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "WARN", "MY_OWN": "two words"}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, done up to upcycling, and the hostfile."""
    folder = tmp_path_factory.mktemp("ways")
    write_cluster_run(folder, prepared=True, cluster={"environment": VARIABLES})
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    return folder


@pytest.fixture(scope="module")
def expected(prepared: Path) -> dict[str, list[float]]:
    """The losses of the ways that ran before."""
    return {}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way in QUICK else [pytest.mark.slow]) for way in WAYS],
)
def test_each_way_trains_the_same_on_two_ranks(
    way: str, cluster: Cluster, prepared: Path, expected: dict[str, list[float]]
) -> None:
    words = WAYS[way].format(hosts=prepared / "hosts", folder=prepared).split()
    where = copy_run(prepared, way)
    output = cluster.run(*words, str(prepared / "run.yaml"), "--stage", "1", *where, **AS_ROOT)
    if way == "sbatch":
        log = prepared / "sbatch.log"
        output = wait_for(
            "the job is not done", lambda: log.is_file() and (t := log.read_text()).endswith("done\n") and t
        )
    assert "6 steps of 8 x 32 tokens on 2 ranks (ep_size 2" in output
    stage = prepared / way / "tiny" / "stage1"
    assert (stage.parent / "manifests" / "stage1.json").is_file()
    first, second = samples_of_ranks(stage)
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(6 * 8))
    starts = [rows[0] for rows in rank_rows(stage)]
    assert [start["host"] for start in starts] == (["login"] * 2 if way in ON_ONE_NODE else ["node1", "node2"])
    for start in starts:
        assert start["variables"].items() >= VARIABLES.items()
    expected[way] = losses(stage)
    assert all(values == expected[way] for values in expected.values()), expected

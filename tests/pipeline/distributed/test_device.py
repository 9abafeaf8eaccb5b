"""A GPU that is missing is named before anything waits. Run: pytest tests/pipeline/distributed/test_device.py"""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from common.errors import AgreedError, OwnError, UserError
from pipeline.distributed import device
from pipeline.distributed.device import agree_on_device, check_gpu, choose_gpu, driver_version, gpu_asked_for

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
NONE = Path("/nowhere")


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "version"
    path.write_text(DRIVER)
    return path


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, "SLURM_GPUS_PER_NODE=h100:4"),
        ({"SLURM_GPUS_PER_NODE": "h100:0"}, None),
        ({"SLURM_STEP_GPUS": "0,1"}, "SLURM_STEP_GPUS=0,1"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),  # which, not how many
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, None),  # DeepSpeed's launcher on CPUs
    ],
)
def test_variables_that_ask_for_a_gpu(environment: dict[str, str], says: str | None) -> None:
    assert gpu_asked_for(environment, NONE) == says


def test_a_loaded_driver_asks_for_a_gpu_unless_gpus_are_hidden(driver: Path) -> None:
    assert gpu_asked_for({}, driver) == "NVIDIA's driver is loaded"
    assert gpu_asked_for({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, driver) == "NVIDIA's driver is loaded"
    assert gpu_asked_for({"CUDA_VISIBLE_DEVICES": ""}, driver) is None
    assert driver_version(driver) == "550.54.15"


def test_no_gpu_where_one_was_asked_for_is_one_line_with_versions(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_is_wanted", False)
    with pytest.raises(OwnError) as error:
        check_gpu({"SLURM_GPUS_ON_NODE": "8"}, driver)
    line = str(error.value)
    assert "SLURM_GPUS_ON_NODE=8, but torch " + torch.__version__ in line
    assert "(driver 550.54.15)" in line and "DS_ACCELERATOR=cpu" in line and "\n" not in line
    with pytest.raises(UserError) as other:
        check_gpu({"SLURM_GPUS_ON_NODE": "8", "LOCAL_RANK": "3"}, driver)
    assert not isinstance(other.value, OwnError), "the node's first rank says it"
    check_gpu({}, NONE)
    monkeypatch.setattr(device, "_is_wanted", True)
    check_gpu({"SLURM_GPUS_ON_NODE": "8"}, driver)  # DS_ACCELERATOR=cpu


@pytest.mark.parametrize(
    ("count", "local_rank", "ordinal"), [(8, "3", 3), (1, "3", 0), (1, "0", 0)], ids=["all", "one each", "only one"]
)
def test_a_rank_that_sees_one_gpu_takes_it_and_deepspeed_too(
    count: int, local_rank: str, ordinal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", local_rank)
    assert choose_gpu() == ordinal
    assert device.os.environ["LOCAL_RANK"] == str(ordinal)
    assert device.os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(ordinal)


def compare(kinds: list[str]) -> list[str]:
    """What each rank says after ranks of these kinds have compared."""
    store, said = HashStore(), [""] * len(kinds)

    def rank(number: int) -> None:
        try:
            agree_on_device(store, number, len(kinds), kinds[number], timedelta(seconds=20))
        except AgreedError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_ranks_on_different_devices_learn_it_before_they_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.socket, "gethostname", lambda: "node7")
    assert compare(["cuda (nccl)"] * 3) == [""] * 3
    said = compare(["cuda (nccl)", "cuda (nccl)", "cpu (gloo)"])
    assert len(set(said)) == 1
    assert "cuda (nccl) on node7; cpu (gloo) on node7" in said[0]

"""What only a GPU shows. They run where torch finds one: DS_ACCELERATOR=cuda python -m pytest tests/gpu"""

import os
from collections.abc import Iterator

import pytest

from pipeline.distributed.process_group import Ranks
from tests.distributed.conftest import Pools, tree  # noqa: F401

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA begins: what parallel.deterministic needs of cuBLAS


@pytest.fixture(scope="session")
def gpu() -> Iterator[Pools]:
    """gpu[1].run(function, …) runs a function on one rank that computes on the GPU, with nccl."""
    yield from pools_on("cuda")


@pytest.fixture(scope="session")
def cpu() -> Iterator[Pools]:
    """The same on the CPU, with gloo."""
    yield from pools_on("cpu")


def pools_on(device: str) -> Iterator[Pools]:
    """Pools whose ranks compute there: they take the environment of when they are started."""
    pools, before = Pools(), os.environ["DS_ACCELERATOR"]
    os.environ["DS_ACCELERATOR"] = device
    try:
        assert pools[1].run(kind_of_device) == [device]
    finally:
        os.environ["DS_ACCELERATOR"] = before
    yield pools
    pools.close()


def kind_of_device(ranks: Ranks) -> str:
    """What a rank computes on."""
    return ranks.device.type

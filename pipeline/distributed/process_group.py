"""The process group: joining it, and what ranks do together."""

import datetime
import gc
import os
import resource
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.distributed

from common.hosts import free_port
from pipeline.distributed.watchdog import Watchdog

DEFAULT_TIMEOUT_MINUTES = 30.0
_joined: "Ranks | None" = None


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks.

    Attributes:
        rank: its number.
        world_size: number of ranks.
        device: its GPU, or the CPU.
        watchdog: ends this process if it is stuck; None in tests of one process.
    """

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog | None = None

    def at(self, where: str) -> None:
        """Tell the watchdog how far this rank has come."""
        if self.watchdog is not None:
            self.watchdog.at(where)

    def stopping(self) -> None:
        """Tell the watchdog that this rank is about to save and end."""
        if self.watchdog is not None:
            self.watchdog.stopping()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.is_first:
            print(text, flush=True)

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place; returns it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def device_type() -> str:
    """``cuda`` if there is a GPU, else ``cpu``; also tells DeepSpeed, which would guess from installed packages."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", kind)
    return kind


def environment_world_size() -> int:
    """How many ranks the launcher started, before any has joined; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def under_launcher() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES) -> Ranks:
    """Join the process group that the launcher's variables describe, or make one of a single rank.

    A process joins once: what it gets then, it gets again until it leaves. DeepSpeed keeps groups of the first one.
    With GPUs the backend is nccl, without any gloo. From here on a watchdog ends the process if it makes no progress
    for ``timeout_minutes`` or if its launcher dies.
    """
    global _joined
    if _joined is not None:
        return _joined
    use_gpu = device_type() == "cuda"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # DeepSpeed calls collectives by names that torch has since replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning, "torch")
    # Its JIT build takes a minute, and a build that is killed leaves a lock on which later runs hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not under_launcher():
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    device = torch.device("cuda", local_gpu()) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    watchdog = Watchdog(int(os.environ["RANK"]), timeout_minutes * 60).start()
    timeout = datetime.timedelta(
        minutes=timeout_minutes, seconds=60
    )  # the watchdog's message says more, so it comes first
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", timeout=timeout, verbose=False)
    _joined = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, watchdog)
    return _joined


def local_gpu() -> int:
    """The number of this rank's GPU: its local rank, or 0 if the launcher shows it only one GPU."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return number if torch.cuda.device_count() > 1 else 0


def leave() -> None:
    """Wait for the other ranks and leave the group, if this process has joined one."""
    global _joined
    if _joined is None:
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if _joined.watchdog is not None:
        _joined.watchdog.stop()
    _joined = None


def forget_earlier_stages(device: torch.device) -> None:
    """Give back the memory of a stage that this process has trained before, and count the peak on a GPU anew."""
    gc.collect()  # an engine lies in a circle of references
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has used: on the GPU, or without one the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

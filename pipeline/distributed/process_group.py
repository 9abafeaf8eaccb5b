"""The process group: joining it, and what ranks do together."""

import datetime
import os
import resource
import signal
import sys
import warnings
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed

from common.hosts import free_port
from common.launch_environment import EARLY_SIGNALS
from pipeline.distributed.watchdog import Watchdog

DEFAULT_TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog | None = None

    def at(self, where: str) -> None:
        """Tell the watchdog how far this rank has come."""
        if self.watchdog is not None:
            self.watchdog.at(where)

    @property
    def is_first(self) -> bool:
        """Rank 0 speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.is_first:
            print(text, flush=True)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place, and return."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def device_type() -> str:
    """``cuda`` or ``cpu``, by what is there; tells DeepSpeed, which would guess by the packages installed."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", kind)
    return kind


def environment_world_size() -> int:
    """How many ranks the launcher started; 1 without one. Known before any rank has joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def under_launcher() -> bool:
    """Whether this process is a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES) -> Ranks:
    """Join the process group that the launcher's variables describe, or make one of a single rank.

    Backend and device are chosen by what is there: nccl and GPUs, or gloo and the CPU. A rank that then
    makes no progress for ``timeout_minutes``, or whose launcher dies, is ended by its watchdog.
    """
    use_gpu = device_type() == "cuda"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of collectives' new names
    # Its JIT build takes a minute, and a killed build leaves a lock that hangs later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not under_launcher():
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    device = torch.device("cuda", local_gpu()) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    watchdog = Watchdog(int(os.environ["RANK"]), timeout_minutes * 60).start()
    timeout = datetime.timedelta(minutes=timeout_minutes, seconds=60)  # the watchdog, which says more, comes first
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", timeout=timeout, verbose=False)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, watchdog)


def local_gpu() -> int:
    """This rank's GPU: its number on the node, or 0 where the launcher lets it see one only."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return number if torch.cuda.device_count() > 1 else 0


def leave(ranks: Ranks) -> None:
    """Wait for the others and leave the group."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if ranks.watchdog is not None:
        ranks.watchdog.stop()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has used: the GPU's, or the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class StopRequest:
    """SIGTERM or SIGUSR1 asks a run to save and end at its next step; handlers are put back on exit."""

    def __init__(self) -> None:
        self.requested = bool(EARLY_SIGNALS)

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

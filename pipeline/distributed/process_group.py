"""The process group: joining it, and what ranks do together."""

import datetime
import gc
import os
import resource
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from common.hosts import free_port
from pipeline.distributed.device import agree_on_device, check_gpu, choose_gpu, device_type
from pipeline.distributed.failures import record_collectives
from pipeline.distributed.watchdog import Watchdog

DEFAULT_TIMEOUT_MINUTES = 30.0
SECONDS_OF_GRACE = 60.0
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_joined: "Ranks | None" = None


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks.

    Attributes:
        rank: its number.
        world_size: number of ranks.
        device: its GPU, or the CPU.
        timeout: of the group's collectives; groups that are made later take it too.
        watchdog: ends this process if it is stuck; None in tests of one process.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=DEFAULT_TIMEOUT_MINUTES)
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
            _barrier(self.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place; returns it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def agreed(self, value: Any) -> Any:
        """The first rank's value on all ranks. All must call this: a shared disk may show them different files."""
        if self.world_size == 1:
            return value
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0)
        return holder[0]

    def hosts(self) -> list[str]:
        """The name of each rank's node. All ranks must call this."""
        names: list[Any] = [socket.gethostname()] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(names, socket.gethostname())
        return names


def environment_world_size() -> int:
    """How many ranks the launcher started, before any has joined; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def under_launcher() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES, errors: Path | None = None) -> Ranks:
    """Join the process group that the launcher's variables describe, or make one of a single rank.

    A process joins once: what it gets then, it gets again until it leaves. DeepSpeed keeps groups of the first one.
    With GPUs the backend is nccl, without any gloo. From here on a watchdog ends the process if it makes no progress
    for ``timeout_minutes`` or if its launcher dies. NCCL's own time-out comes before it, as NCCL then writes down its
    last collectives; gloo's comes after it, as the watchdog says more: see :func:`time_limits`.

    Args:
        timeout_minutes: how long a rank may make no progress.
        errors: the folder for what NCCL writes down.

    Raises:
        UserError: torch finds no GPU where one was asked for, or ranks compute on different devices.
    """
    global _joined
    if _joined is not None:
        return _joined
    check_gpu()
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
    device = torch.device("cuda", choose_gpu()) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    rank, world_size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), BACKENDS[device.type]
    timeout, patience = time_limits(backend, timeout_minutes)
    if errors is not None and use_gpu:
        record_collectives(errors)
    watchdog = Watchdog(rank, patience.total_seconds()).start()
    store, *_ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    agree_on_device(store, rank, world_size, f"{device.type} ({backend})", timeout)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    _joined = Ranks(rank, world_size, device, timeout, watchdog)
    return _joined


def time_limits(backend: str, minutes: float) -> tuple[datetime.timedelta, datetime.timedelta]:
    """How long a collective may take, and how long the watchdog waits: one of them ``minutes``, the other longer."""
    limit = datetime.timedelta(minutes=minutes)
    later = limit + datetime.timedelta(seconds=SECONDS_OF_GRACE)
    return (limit, later) if backend == "nccl" else (later, limit)


def take_timeout(*groups: torch.distributed.ProcessGroup) -> None:
    """Give groups that DeepSpeed has made the time-out of the one that this process has joined; its own is torch's."""
    if _joined is not None:
        for group in groups:
            _set_pg_timeout(_joined.timeout, group)


def alone(device: str | None = None) -> Ranks:
    """This process by itself, in no group: on its GPU if it has one, unless a device is named."""
    return Ranks(0, 1, torch.device(device or device_type()))


def leave() -> None:
    """Wait for the other ranks and leave the group, if this process has joined one."""
    global _joined
    if _joined is None:
        return
    _barrier(_joined.device)
    torch.distributed.destroy_process_group()
    if _joined.watchdog is not None:
        _joined.watchdog.stop()
    _joined = None


def _barrier(device: torch.device) -> None:
    """Wait for all ranks; NCCL would guess from the rank which GPU is this one's."""
    torch.distributed.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def forget_earlier_stages(device: torch.device) -> None:
    """Give back the memory of a stage that this process has trained before, and count the peak on a GPU anew."""
    gc.collect()  # an engine lies in a circle of references
    if gc.get_freeze_count() == 0:
        # All that was imported stays: DeepSpeed collects eight times an engine, 0.2 s each if it looks at that too.
        gc.freeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has used: on the GPU, or without one the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

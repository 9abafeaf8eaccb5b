"""What ranks compute on: a GPU or the CPU, whether that is what was meant, and whether all ranks have the same."""

import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch.distributed.distributed_c10d import Store

from common.cpu import cpu_name
from common.errors import AgreedError, OwnError, UserError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Variables by which SLURM says how many GPUs a job has on this node, as "4" or "h100:4", and which.
SLURM_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
SLURM_LISTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
HIDDEN = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES
SAME = "all alike"
_is_wanted: bool | None = None  # that it computes on the CPU though GPUs may be here


def device_type() -> str:
    """``cuda`` if there is a GPU and DS_ACCELERATOR does not say ``cpu``, else ``cpu``.

    It also tells DeepSpeed, which would guess from installed packages.
    """
    global _is_wanted
    if _is_wanted is None:
        _is_wanted = os.environ.get("DS_ACCELERATOR") == "cpu"
    kind = "cuda" if torch.cuda.is_available() and not _is_wanted else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", kind)
    return kind


def num_gpus() -> int:
    """How many GPUs this process computes on or could."""
    return torch.cuda.device_count() if device_type() == "cuda" else 0


def device_name(device: torch.device) -> str:
    """What a rank computes on, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def device_memory(device: torch.device) -> int:
    """The bytes that it has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def check_gpu(environment: Mapping[str, str] = os.environ, driver_file: Path = DRIVER_FILE) -> None:
    """Refuse to compute on the CPU where a GPU was asked for.

    Raises:
        UserError: torch finds no GPU, though SLURM's or CUDA's variables name one, or the driver is loaded. On a node
            with several ranks, the first of them says it.
    """
    if device_type() == "cuda" or _is_wanted:
        return
    why = gpu_asked_for(environment, driver_file)
    if why is None:
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs alone"
    line = (
        f"{socket.gethostname()}: {why}, but torch {torch.__version__}, {built}, finds no GPU (driver "
        f"{driver_version(driver_file) or 'not loaded'}); see nvidia-smi there, install a torch that fits its driver, "
        "or set DS_ACCELERATOR=cpu to compute on the CPU"
    )
    raise OwnError(line) if environment.get("LOCAL_RANK", "0") == "0" else UserError(line)


def gpu_asked_for(environment: Mapping[str, str], driver_file: Path = DRIVER_FILE) -> str | None:
    """What says that a GPU is meant to be used here; None if nothing does."""
    for name in (*SLURM_COUNTS, *SLURM_LISTS):
        value = environment.get(name, "")
        is_none = name in SLURM_COUNTS and value.rpartition(":")[2] == "0"
        if value and not is_none:
            return f"{name}={value}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "CROSS_RANK" not in environment:  # DeepSpeed's launcher sets it on CPUs too
        return None if visible in HIDDEN else f"CUDA_VISIBLE_DEVICES={visible}"
    return "NVIDIA's driver is loaded" if driver_file.is_file() else None


def driver_version(driver_file: Path = DRIVER_FILE) -> str | None:
    """The version of NVIDIA's driver; None if none is loaded."""
    try:
        text = driver_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*(\d[\d.]*)", text)
    return found[1] if found else "unknown"


def choose_gpu() -> int:
    """The ordinal of this rank's GPU: its local rank, or 0 where its launcher shows each rank one GPU alone.

    DeepSpeed takes LOCAL_RANK for the ordinal, so that is set to it.
    """
    ordinal = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    os.environ["LOCAL_RANK"] = str(ordinal)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed compares the two
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(ordinal)
    return ordinal


def agree_on_device(store: Store, rank: int, world_size: int, device: str, timeout: timedelta) -> None:
    """Compare over the store what all ranks compute on, before they form a group, which would wait for ever.

    Args:
        store: of all ranks.
        rank: this one.
        world_size: how many there are.
        device: what this one computes on, such as ``cuda (nccl)``.
        timeout: how long to wait for the others.

    Raises:
        AgreedError: ranks compute on different devices; it names the nodes of each.
    """
    store.set(f"device/{rank}", f"{device}\t{socket.gethostname()}")
    if rank == 0:
        nodes: dict[str, list[str]] = {}
        keys = [f"device/{other}" for other in range(world_size)]
        store.wait(keys, timeout)
        for key in keys:
            kind, _, host = store.get(key).decode().partition("\t")
            known = nodes.setdefault(kind, [])
            if host not in known:
                known.append(host)
        differ = "; ".join(f"{kind} on {', '.join(hosts)}" for kind, hosts in nodes.items())
        store.set("device/differ", differ if len(nodes) > 1 else SAME)
    store.wait(["device/differ"], timeout)
    differ = store.get("device/differ").decode()
    if differ != SAME:
        raise AgreedError(f"ranks do not compute on the same kind of device: {differ}; fix or leave out those nodes")

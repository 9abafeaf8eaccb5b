"""Device: what a rank computes on, as far as an estimate has to know it."""

import os
import re
from dataclasses import dataclass

import psutil
import torch

from common.errors import UserError
from pipeline.distributed.device import device_memory

# Gigabytes of memory (10^9 bytes).
DEVICES = {"a100-40": 42.9, "a100": 85.9, "h100": 85.0, "h200": 151.0, "b200": 192.0, "l40s": 48.3, "mi300x": 206.0,
           "rtx4090": 25.8}  # fmt: skip
GPU_PROCESS = 1_200_000_000  # bytes: a CUDA context and NCCL's buffers


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        type: cpu or cuda.
        capacity: a rank's share of its memory in bytes; None where nothing is to fit.
    """

    type: str = "cpu"
    capacity: float | None = None

    @classmethod
    def named(cls, name: str | None) -> "Device":
        """The device that a user names: one of ``DEVICES``, gigabytes such as 80GB, or cpu, as without a name.

        Raises:
            UserError: it is neither known nor a number of gigabytes.
        """
        if name in (None, "cpu"):
            return cls()
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|G)?", str(name), re.IGNORECASE)
        gigabytes = float(size[1]) if size else DEVICES.get(str(name).lower())
        if gigabytes is None:
            raise UserError(f"--device {name}: unknown; use cpu, {', '.join(DEVICES)}, or gigabytes such as 80GB")
        return cls("cuda", gigabytes * 1e9)

    @classmethod
    def of_this_rank(cls, device: torch.device) -> "Device":
        """The one that this process computes on; ranks on the same CPU share its memory."""
        ranks = 1 if device.type == "cuda" else ranks_per_node()
        return cls(device.type, device_memory(device) / ranks)

    @property
    def process(self) -> int:
        """Bytes of a process on it before it holds any model."""
        return GPU_PROCESS if self.type == "cuda" else int(psutil.Process().memory_info().rss)


def ranks_per_node() -> int:
    """How many ranks the launcher started on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

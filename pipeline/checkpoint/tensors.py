"""Checkpoint files of tensors: their names, and how they are written and read."""

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import sha256_file
from pipeline.records.checkpoint import FileEntry

WRITE_AT_ONCE = 8 << 20  # bytes


def main_file() -> str:
    """The file of everything that is not an expert."""
    return "mp_rank_00_model_states.pt"


def expert_file(moe_layer: int, number: int) -> str:
    """The file of one new expert.

    Args:
        moe_layer: number of the layer among those with a router.
        number: of the expert among the layer's new ones, from 0.
    """
    return f"layer_{moe_layer}_expert_{number}_mp_rank_00_model_states.pt"


def optimizer_file(rank: int, *, bf16: bool) -> str:
    """The file of one rank's part of the ZeRO optimizer."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def router_optimizer_file() -> str:
    """The file of the routers' optimizer without ZeRO."""
    return "expp_rank_0_mp_rank_00_optim_states.pt"


class _HashingWriter:
    """A file for torch.save that hashes what it writes, in another thread.

    An error is kept until :meth:`close`: raised at once it would pass through torch's C++ writer, whose destructor
    writes again.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self.hash = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None
        self.hasher = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            hashed = self.hasher.submit(self.hash.update, view)
            try:
                for start in range(0, len(view), WRITE_AT_ONCE):
                    self._write_all(view[start : start + WRITE_AT_ONCE])
                    if len(view) >= WRITE_AT_ONCE:
                        self._begin_writeback()
            except OSError as error:
                self.error = error
            hashed.result()
            self.bytes += len(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self.file.write(view) :]

    def _begin_writeback(self) -> None:
        """Let the kernel write to the disk now, while we hash, not only when the file is synced."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""

    def close(self) -> None:
        """Sync and close.

        Raises:
            OSError: a write, or the sync, failed.
        """
        try:
            self.hasher.shutdown()
            if self.error is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
        if self.error is not None:
            raise self.error


def save_tensors(value: Any, path: Path) -> FileEntry:
    """Write with torch.save under a temporary name, sync, rename.

    Args:
        value: tensors in nested dictionaries and lists.
        path: of the file.

    Returns:
        The file's ``bytes`` and ``sha256``.

    Raises:
        OSError: it can't be written, as on a full disk; nothing is left of the file.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        writer = _HashingWriter(temporary)
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # our sha256 makes them superfluous
        try:
            torch.save(value, writer)  # type: ignore[arg-type]
        finally:
            torch.serialization.set_crc32_options(checksums)
            writer.close()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return FileEntry(bytes=writer.bytes, sha256=writer.hash.hexdigest())


def file_entry(path: Path) -> FileEntry:
    """A file's size and hash, read from the disk."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))


def load_tensors(path: Path) -> Any:
    """Read what :func:`save_tensors` wrote. Tensors are mapped into memory; no code from the file is run.

    Raises:
        UserError: it can't be read.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path}: can't be read as a checkpoint file ({str(error).splitlines()[0]}); use an earlier checkpoint"
            ) from error

"""Starting ranks on this machine through the real DeepSpeed launcher."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.distributed import free_port
from pipeline.errors import EXIT_CODE, UserError

ROOT = Path(__file__).resolve().parent.parent
ENTRY = ROOT / "launch" / "train.sh"


def start_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run ``deepspeed launch/train.sh ARGUMENTS`` with so many local ranks, and wait for it.

    Raises:
        UserError: it failed; the ranks have said why.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks),
        "--master_port", str(free_port()), str(ENTRY), *arguments,
    ]  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": _accelerator(), **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    process = subprocess.run(command, env=environment, cwd=Path.cwd(), check=False)
    if process.returncode == EXIT_CODE:
        raise SystemExit(EXIT_CODE)  # a rank has said its one line
    if process.returncode:
        raise UserError(f"{' '.join(command[-len(arguments) - 1 :])}: ended with code {process.returncode}; see above for why")


def _accelerator() -> str:
    """DeepSpeed finds its accelerator by which packages are there; say it instead."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

"""Starting ranks on this machine through the real DeepSpeed launcher."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.distributed import device_type, free_port
from pipeline.errors import EXIT_CODE, UserError

ROOT = Path(__file__).resolve().parent.parent
ENTRY = ROOT / "launch" / "train.sh"


def run_verb(verb: str, run_file: Path, *, force: bool) -> None:
    """``python -m pipeline VERB RUN.yaml`` in a process of its own.

    Raises:
        UserError: it failed; it has said why.
    """
    command = [sys.executable, "-m", "pipeline", verb, str(run_file), *(["--force"] if force else [])]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    _wait(command, {**os.environ, "PYTHONPATH": path})


def start_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run ``deepspeed launch/train.sh ARGUMENTS`` with so many local ranks, and wait for it.

    Raises:
        UserError: it failed; the ranks have said why.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks),
        "--master_port", str(free_port()), "--log_level", "error", str(ENTRY), *arguments,
    ]  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": device_type(), **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    _wait(command, environment)


def _wait(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.run(command, env=environment, check=False)
    if process.returncode == EXIT_CODE:
        raise SystemExit(EXIT_CODE)  # it has said its one line
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with code {process.returncode}; see above for why")

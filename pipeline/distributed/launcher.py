"""Starting ranks on this machine through DeepSpeed's launcher."""

import base64
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from common.errors import EXIT_CODE, UserError, say_ended
from common.hosts import free_port
from pipeline.distributed.device import check_gpu, device_type, num_gpus
from pipeline.distributed.watchdog import STARTED_BY

RANKS_PER_CORE = 8
ROOT = Path(__file__).resolve().parents[2]


def run_verb(verb: str, run_file: Path, *, force: bool) -> None:
    """Run ``python -m pipeline VERB RUN.yaml`` in a separate process; if it fails, end with its exit code."""
    command = [sys.executable, "-m", "pipeline", verb, str(run_file), *(["--force"] if force else [])]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    _wait(command, {**os.environ, "PYTHONPATH": path}, f"{verb} {run_file}")


def start_ranks(arguments: list[str], num_ranks: int, entry: str = "train.sh") -> None:
    """Do what ``deepspeed launch/ENTRY ARGUMENTS`` does, and wait for it; if it fails, end with its exit code.

    Of DeepSpeed's two launchers the one that starts a node's ranks is called, without the one that finds nodes: that
    one would look for a hostfile, and give ranks the first GPUs though others are visible.

    Args:
        arguments: of the entry.
        num_ranks: how many ranks to start on this machine.
        entry: a file of launch/.

    Raises:
        UserError: they are more than this machine can hold.
    """
    check_room(num_ranks)
    world = json.dumps({"localhost": devices(num_ranks)}).encode()
    command = [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(world).decode()}", "--master_addr=127.0.0.1",
        f"--master_port={free_port()}", "--log_level=critical", str(ROOT / "launch" / entry), *arguments,
    ]  # fmt: skip
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": device_type(), **os.environ}
    environment[STARTED_BY] = f"{os.getpid()} {psutil.Process().create_time()}"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    _wait(command, environment, f"{' '.join(arguments)} on {num_ranks} ranks")


def devices(num_ranks: int) -> list[int | str]:
    """What each rank computes on: the GPUs that CUDA_VISIBLE_DEVICES names, in its order, or numbers from 0."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if device_type() == "cuda" and len(visible) >= num_ranks:
        return list(visible[:num_ranks])
    return list(range(num_ranks))


def check_room(num_ranks: int) -> None:
    """Whether this machine can hold so many ranks: one per GPU, or without any a few per core.

    Raises:
        UserError: it can't, or torch finds no GPU where one was asked for.
    """
    check_gpu()
    if num_ranks < 1:
        raise UserError(f"{num_ranks} ranks: at least 1 is needed (parallel.ranks, --ranks)")
    gpus, cores = num_gpus(), os.cpu_count() or 1
    most, has = (gpus, f"{gpus} GPUs") if gpus else (cores * RANKS_PER_CORE, f"{cores} cores and no GPU")
    if num_ranks > most:
        raise UserError(
            f"{num_ranks} ranks do not fit on this machine with {has}; start at most {most} here "
            "(parallel.ranks, --ranks), or launch over more machines: deepspeed --hostfile, srun, submit"
        )


def _wait(command: list[str], environment: dict[str, str], what: str) -> None:
    """Run a command to its end; ``what`` says what it does.

    A signal to stop, Ctrl-C too, is passed to the ranks: those in training save and end, others just end. DeepSpeed's
    launchers would leave them running or kill them. A second signal, or one that finds no ranks, kills everything.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        ranks = _ranks_below(process.pid)
        with suppress(psutil.Error, ProcessLookupError):  # some may have ended just now
            if len(received) > 1 or not ranks:
                os.killpg(process.pid, signal.SIGKILL)
            for rank in ranks:
                rank.terminate()  # also while Python starts, where SIGINT is a traceback

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        _end_stopped(code, received[0])
    if code and code != EXIT_CODE:  # for bad input one line has been printed already
        print(f"error: {what}: ended with code {code}; see above for why", file=sys.stderr, flush=True)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)  # a shell's code for a signal


def _end_stopped(code: int, number: int) -> None:
    """End this process as a signal's number asked for; return if the command ended for another reason."""
    name = signal.Signals(number).name
    if code == 0:
        print(f"stopped by {name}; the same command resumes from there", flush=True)
        raise SystemExit(0)
    # Killed above, or a rank that was not in training: DeepSpeed's launchers end with the rank's code.
    if code in (-signal.SIGKILL, 256 - signal.SIGTERM):
        say_ended(name)
        raise SystemExit(128 + number)


def _ranks_below(pid: int) -> list[psutil.Process]:
    """The ranks among the processes that a launcher has started."""
    try:
        return [child for child in psutil.Process(pid).children(recursive=True) if "RANK" in child.environ()]
    except psutil.Error:
        return []

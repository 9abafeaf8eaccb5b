"""Starting a real run, finding its processes, killing some, and seeing the others end."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """A user's: no launcher's variables, one thread per rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return clean | {
        "PATH": f"{BIN}{os.pathsep}{clean.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


@dataclass
class Launch:
    """``python -m pipeline VERB RUN.yaml …``, or another program, in its own session, its output in a file."""

    words: list[str]
    log: Path
    program: tuple[str, ...] = ("-m", "pipeline")
    process: subprocess.Popen[bytes] = field(init=False)
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, *self.words],
                cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.look()

    def look(self) -> list[psutil.Process]:
        """All processes of the launch that live now; they are remembered."""
        try:
            top = psutil.Process(self.process.pid)
            for process in (top, *top.children(recursive=True)):
                self.seen[process.pid] = process
        except psutil.Error:
            pass
        return [process for process in self.seen.values() if alive(process)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks, by number."""
        found = {}
        for process in self.look():
            try:
                if "train.sh" in " ".join(process.cmdline()) and "LOCAL_RANK" in process.environ():
                    found[int(process.environ()["RANK"])] = process
            except (psutil.Error, KeyError):
                continue
        return found

    def launcher(self, name: str) -> psutil.Process | None:
        """DeepSpeed's launcher of a node (``launch``), or else the command that was started, if it lives."""
        for process in self.look():
            try:
                is_launch = "deepspeed.launcher.launch" in process.cmdline()
            except psutil.Error:
                continue
            is_command = process.pid == self.process.pid
            if (name == "launch" and is_launch) or (name != "launch" and is_command):
                return process
        return None

    def wait_until_gone(self, seconds: float) -> float:
        """Wait for every process of the launch to end; how long it took.

        Raises:
            AssertionError: some still live; they are then killed.
        """
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            self.process.poll()
            if not self.look():
                return time.monotonic() - started
            time.sleep(0.05)
        left = [" ".join(process.cmdline()[:6]) for process in self.look()]
        self.kill()
        raise AssertionError(f"still alive {seconds:.0f} s later: {left}")

    def kill(self) -> None:
        """End everything at once."""
        for process in self.look():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """The command's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait_for(what: Callable[[], Any], launch: Launch, seconds: float = 120) -> None:
    """Ask until the answer is true, as long as the launch lives."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and launch.process.poll() is None, launch.log.read_text()[-3000:]
        time.sleep(0.02)

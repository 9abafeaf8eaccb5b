"""A real SLURM cluster with sshd: a login node and two nodes, in namespaces of this machine.

All of it lives in one process namespace that ends with the test's process, however that ends: the
kernel takes daemons, nodes, networks and mounts away together, and nothing of the host was changed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.settings import NODES, write_settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BIN = Path(sys.executable).parent
PACKAGES = ("slurmd", "slurmctld", "slurm-client", "munge", "openssh-server", "openssh-client", "pdsh", "iproute2",
            "openmpi-bin")  # fmt: skip
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child")


def why_not() -> str | None:
    """Why no cluster can be started here; None if it can. Installs the Debian packages that it needs."""
    if os.geteuid() != 0:
        return "the cluster needs root"
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        return "this machine allows no namespaces"
    install = f". {ROOT}/launch/environment.sh; system_packages {' '.join(PACKAGES)}"
    done = subprocess.run(["bash", "-c", install], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()[-40:])
        return f"Debian packages are missing and can't be installed: {', '.join(PACKAGES)} ({said})"
    return None


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Ask until the answer is true, and return it; an AssertionError that says ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, f"after {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Cluster:
    """The cluster, from :func:`running_cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._links = 0

    def start(self) -> None:
        """Start everything, and wait until both nodes are idle."""
        write_settings(self.folder)
        # The cluster dies with this process: setpriv ties unshare to us, unshare its first process to itself.
        words = ["setpriv", "--pdeathsig", "KILL", *UNSHARE, "bash", str(HERE / "login_init.sh"), str(self.folder)]
        with open(self.folder / "log" / "login.out", "wb") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(f"login node is not up: {self.logs()}", (self.folder / "login.ready").is_file, 30)
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def stop(self) -> None:
        """End everything at once."""
        self.process.kill()
        self.process.wait()

    def start_node(self, node: str) -> None:
        """Start a node and plug it in."""
        self._links += 1
        script = (
            f"setsid {' '.join(UNSHARE)} bash {HERE}/node_init.sh {self.folder} {node} "
            f"</dev/null >>{self.folder}/log/{node}.out 2>&1 & echo $! >{self.folder}/{node}.pid; "
            # Until unshare has left our network.
            "while [ $(readlink /proc/$!/ns/net) = $(readlink /proc/self/ns/net) ]; do sleep 0.05; done; "
            f"ip link add veth{self._links} type veth peer name eth0 netns $! && "
            f"ip link set veth{self._links} master cluster up"
        )
        self.run("bash", "-c", script)

    def kill_node(self, node: str) -> None:
        """Cut a node off with all its processes, as a power failure does."""
        self.run("kill", "-KILL", (self.folder / f"{node}.pid").read_text().strip())

    def wait_until_idle(self) -> None:
        """Until no job runs and both nodes take work."""

        def idle() -> bool:
            text = self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).strip()
            return text == str(len(NODES))

        wait_for(f"nodes are not idle: {self.logs()}", idle, 60)

    def run(self, *words: str, seconds: float = 120, check: bool = True, cwd: Path = ROOT, **environment: str) -> str:
        """Run a command on the login node; its output, both streams."""
        done = self.attempt(*words, seconds=seconds, cwd=cwd, **environment)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def attempt(
        self, *words: str, seconds: float = 120, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, whatever comes of it."""
        enter = ["nsenter", "--target", str(self._first_process()), "--mount", "--net", "--pid", "--uts", "--ipc"]
        return subprocess.run(
            [*enter, f"--wd={cwd}", "timeout", "-k", "5", str(seconds), *words], env=clean_environment() | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip

    def _first_process(self) -> int:
        children = psutil.Process(self.process.pid).children()
        assert children, f"the cluster has ended: {self.logs()}"
        return int(children[0].pid)

    def logs(self) -> str:
        """The last lines of all daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)


def clean_environment() -> dict[str, str]:
    """What a user's shell on the login node has: no variables of a launcher, this Python first on the path."""
    started = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON", "OMP_NUM_THREADS")
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in started and not key.startswith(("SLURM_", "OMPI_", "PMIX_", "HF_", "DS_"))
    }
    variables["PATH"] = f"{BIN}{os.pathsep}{variables.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    return variables


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster, stopped again whatever fails."""
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)

"""Real gloo ranks for tests: processes that stay, join one group, and run functions of test modules."""

import gc
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from common.hosts import free_port

SECONDS = 240.0
# On CPUs ranks are forks of a server that has only imported everything, which takes 5 s of a core; CUDA forbids that.
_CONTEXT: Any = mp.get_context("forkserver" if os.environ.get("DS_ACCELERATOR") == "cpu" else "spawn")
_CONTEXT.set_forkserver_preload(["tests.distributed.observed"])


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from pipeline.distributed.process_group import join, leave

    torch.set_num_threads(1)
    ranks = join()
    gc.freeze()  # as a stage does, also where a test takes single steps
    while True:
        message = connection.recv()
        if message is None:
            break
        function, arguments = message
        try:
            connection.send((True, function(ranks, *arguments)))
        except BaseException:  # noqa: BLE001 - whatever it was, the test is to show it
            connection.send((False, traceback.format_exc()))
    leave()


class RankPool:
    """``world_size`` ranks. A function runs on all at once; its first argument is the rank's ``Ranks``."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.world_size = world_size
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The function's result on each rank. A failure on any rank ends the pool and raises."""
        for connection in self.connections:
            connection.send((function, arguments))
        results, failures = [], []
        for rank, connection in enumerate(self.connections):
            # Once a rank has failed, the others may wait for it for ever.
            if not connection.poll(5.0 if failures else SECONDS):
                failures.append(f"rank {rank}: no answer")
                continue
            good, value = connection.recv()
            if good:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.kill()
            raise AssertionError("\n".join(failures))
        return results

    @property
    def alive(self) -> bool:
        """Whether all ranks can take another function."""
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """Let the ranks leave."""
        if self.alive:
            for connection in self.connections:
                connection.send(None)
            for process in self.processes:
                process.join(20)
        self.kill()

    def kill(self) -> None:
        """End the ranks at once."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

"""Which executor a process uses: MPI under mpirun, claims among SLURM tasks, else processes on this machine."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor as Pool
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, get_context
from typing import Literal, cast

from common.errors import UserError
from common.launch_environment import is_srun_task
from data_prep.executor.pool import PoolExecutor, num_cores
from data_prep.executor.task_claims import Claims

Backend = Literal["auto", "local", "mpi", "array"]
BACKENDS: tuple[Backend, ...] = ("auto", "local", "mpi", "array")
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE")


def backend_here() -> Backend:
    """What this process was started by."""
    if any(int(os.environ.get(name, "1")) > 1 for name in MPI_VARIABLES):
        return "mpi"
    if "PMIX_RANK" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "mpi"
    return "array" if "SLURM_ARRAY_TASK_ID" in os.environ or shares_an_srun() else "local"


def shares_an_srun() -> bool:
    """Whether srun has started this process and others beside it."""
    return is_srun_task(os.environ) and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


@contextmanager
def open_executor(backend: Backend = "auto", workers: int | None = None) -> Iterator[PoolExecutor | None]:
    """The executor of this process; None in an MPI rank that only works, for which all is over when it is yielded.

    Args:
        backend: what runs tasks; "auto" is what this process was started by.
        workers: processes on this machine; by default one per core. One is this process itself.

    Raises:
        UserError: mpi4py is missing, or the backend does not fit the surroundings.
    """
    chosen = backend_here() if backend == "auto" else backend
    if chosen == "mpi":
        with _mpi() as executor:
            yield executor
        return
    with ExitStack() as stack:
        executor = stack.enter_context(_local(num_cores() if workers is None else workers))
        if chosen == "array":
            owner, executor.show = _place_among_tasks()
            executor.claim = stack.enter_context(Claims(owner)).tasks
        yield executor


def _place_among_tasks() -> tuple[str, bool]:
    """This task's name, the same after a restart, and whether it shows what they do: of srun's, the first does."""
    if shares_an_srun():
        number = os.environ["SLURM_PROCID"]
        return f"{os.environ['SLURM_JOB_ID']}.{number}", number == "0"
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise UserError("--executor array: not a SLURM task; start it with srun, or sbatch --array=0-63")
    return f"{os.environ.get('SLURM_ARRAY_JOB_ID', '0')}_{os.environ['SLURM_ARRAY_TASK_ID']}", True


@contextmanager
def _local(workers: int) -> Iterator[PoolExecutor]:
    if workers <= 1:
        yield PoolExecutor()
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        yield PoolExecutor(pool, workers)
    except KeyboardInterrupt:
        for worker in active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def one_thread() -> None:
    """Keep libraries from starting threads where every core has a process already."""
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _begin_worker(parent: int) -> None:
    one_thread()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed ends: nothing would tell it otherwise."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _mpi() -> Iterator[PoolExecutor | None]:
    one_thread()
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--executor mpi: mpi4py can't be used ({error}); pip install mpi4py and an MPI") from error
    if MPI.COMM_WORLD.Get_size() == 1:
        yield PoolExecutor()
        return
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as pool:
        # In every rank but the first, the block is reached when there is nothing left to do.
        yield None if pool is None else PoolExecutor(cast(Pool, pool), MPI.COMM_WORLD.Get_size() - 1)

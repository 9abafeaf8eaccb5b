"""Which rank this process is, and its variables, whatever launched it. Runs before torch is imported.

Each launcher has its own variables: DeepSpeed and torchrun with RANK, mpirun with OMPI_*, srun with SLURM_*.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, MutableMapping

from common.errors import EXIT_CODE, UserError
from common.hosts import free_port, interface_towards, own_address

Environment = MutableMapping[str, str]
# DeepSpeed and torch read these; where one is missing, DeepSpeed would try MPI, which ends a rank under srun.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NOT_A_TASK = 4294967280  # step numbers from here on are SLURM's own: the batch script, an interactive shell
SECONDS_FOR_MPI = 120.0
_FIRST_PORT, _NUM_PORTS = 12000, 20000  # below the ports that systems hand out themselves


EARLY_SIGNALS: list[int] = []  # SIGUSR1 that came before training handles it: a rank takes long to start


def listen_early() -> None:
    """Note SIGUSR1 from the start of the process, which would end it otherwise."""
    signal.signal(signal.SIGUSR1, lambda number, _frame: EARLY_SIGNALS.append(number))


def become_rank(environment: Environment = os.environ) -> None:
    """Set the variables of torch from those of the launcher that started this process; none, if none did.

    Raises:
        UserError: ranks on several hosts can't be told where rank 0 is.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    elif "OMPI_COMM_WORLD_RANK" in environment:
        _become_rank_of_mpirun(environment)
    elif is_srun_task(environment):
        _become_rank_of_srun(environment)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or not a rank: the one that prints, and writes shared files."""
    return os.environ.get("RANK", "0") == "0"


def is_srun_task(environment: Environment) -> bool:
    """Whether srun started this process, rather than a batch script or a shell inside an allocation."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _NOT_A_TASK and "SLURM_PROCID" in environment


def _become_rank_of_srun(environment: Environment) -> None:
    local = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=local[0] if local else "1",
    )
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # All ranks work it out alike; another one after each restart, as the last may not be free yet.
    number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"]) * 7
    number += int(environment.get("SLURM_RESTART_COUNT", "0"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _NUM_PORTS))


def _become_rank_of_mpirun(environment: Environment) -> None:
    size, local_size = environment["OMPI_COMM_WORLD_SIZE"], environment["OMPI_COMM_WORLD_LOCAL_SIZE"]
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        address, port = _agree_over_mpi(int(size))
        environment.setdefault("MASTER_ADDR", address)
        environment.setdefault("MASTER_PORT", str(port))
    environment.update(
        RANK=environment["OMPI_COMM_WORLD_RANK"],
        WORLD_SIZE=size,
        LOCAL_RANK=environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        LOCAL_WORLD_SIZE=local_size,
    )


def _agree_over_mpi(world_size: int) -> tuple[str, int]:
    """Rank 0's address and a free port of it, told over MPI; then MPI is left, and ranks are plain processes."""
    fix = "name the first host yourself: mpirun -x MASTER_ADDR=… -x MASTER_PORT=29500 …"
    # Started by another MPI than mpi4py's, MPI may wait forever.
    timer = threading.Timer(SECONDS_FOR_MPI, _give_up, [f"mpirun: MPI does not start from mpi4py; {fix}"])
    timer.daemon = True
    timer.start()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun: mpi4py can't be used to find rank 0 ({error}); pip install mpi4py, or {fix}"
        ) from error
    found = MPI.COMM_WORLD.Get_size()
    if found != world_size:
        raise UserError(
            f"mpirun: it started {world_size} processes, but mpi4py counts {found}, as it uses another MPI; {fix}"
        )
    place = (own_address(), free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    address, port = MPI.COMM_WORLD.bcast(place, root=0)
    MPI.Finalize()
    timer.cancel()
    return address, port


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def first_host(hosts: str) -> str:
    """The first host of SLURM's short form: "node[01-04,7],gpu9" is node01."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)
    if not first:
        raise UserError(f"SLURM_STEP_NODELIST: {hosts!r} names no host; set MASTER_ADDR to the first node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def set_variables(variables: Mapping[str, str], environment: Environment = os.environ) -> None:
    """Set the run's variables, what follows from this rank's place (threads, gloo's interface), and a GPU's allocator.

    Every layer gets another number of rows each time, which would leave gaps in memory that is allocated in blocks.

    The run's own come before the shell's: launchers pass on different parts of a shell, and ranks must agree.
    """
    environment.update(variables)
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the name of before
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "RANK" not in environment:
        return
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(environment)))
    if environment.get("LOCAL_WORLD_SIZE") != environment.get("WORLD_SIZE"):
        interface = interface_towards(environment.get("MASTER_ADDR", ""))
        if interface:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)


def threads_per_rank(environment: Environment) -> int:
    """The cores that are this rank's: those it is bound to, or its share of the host's."""
    if environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return int(environment["SLURM_CPUS_PER_TASK"])
    bound, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    share = bound if bound < all_cores else all_cores // int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, share)

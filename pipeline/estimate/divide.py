"""How the ranks of a run are divided, where the run leaves that to the estimate."""

import torch

from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.estimate.device import Device, ranks_per_node
from pipeline.estimate.report import Estimate


def divide(run: RunConfig, ranks: Ranks) -> ParallelDims:
    """The run's ``parallel.ep_size``; for ``auto`` the smallest with which all stages fit the first rank's device.

    A model without experts has groups of one rank. Where none fits, it is the one that needs least, and a line says
    so. All ranks must call this; the expert plan must be there.

    Raises:
        UserError: the run's ``ep_size`` does not divide the number of ranks.
    """
    parallel = run.parallel
    if run.method.is_dense:
        return ParallelDims(ranks.world_size, 1, ranks.rank, parallel.max_imbalance)
    ep_size = _choose(run, ranks) if parallel.ep_size == "auto" else parallel.ep_size
    return ParallelDims(ranks.world_size, ep_size, ranks.rank, parallel.max_imbalance)


def _choose(run: RunConfig, ranks: Ranks) -> int:
    if ranks.world_size == 1:
        return 1
    ep_size = torch.zeros((), dtype=torch.int64, device=ranks.device)
    if ranks.is_first:
        estimate = Estimate(run, ranks.world_size, Device.of_this_rank(ranks.device), per_node=ranks_per_node())
        ep_size += estimate.dims.ep_size
        if estimate.smallest_ep_size() is None:
            print(f"warning: parallel.ep_size: {estimate.fit_line()}; ep_size {int(ep_size)} is tried", flush=True)
    return int(ranks.sum(ep_size))

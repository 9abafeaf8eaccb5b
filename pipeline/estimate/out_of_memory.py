"""What to do where a GPU's memory does not hold a stage, with what was expected of it."""

import torch

from pipeline.distributed.device import device_memory, device_name
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import peak_memory_bytes
from pipeline.estimate.report import Estimate
from pipeline.run.context import RunContext


def out_of_memory(context: RunContext, number: int, world_size: int, device: torch.device) -> str:
    """One line.

    Args:
        context: the run.
        number: of the stage.
        world_size: ranks.
        device: whose memory is full.
    """
    run, stage = context.run, context.stage(number)
    dims = ParallelDims(world_size, run.parallel.ep_size)
    has, held = device_memory(device) / 1e9, peak_memory_bytes(device) / 1e9
    estimate = Estimate(run, dims, f"{has}GB")
    expected, batch = estimate.memory(stage)["peak"] / 1e9, estimate.batch(stage, dims)
    fixes = [f"parallel.micro_batch_size below {batch.sequences}"] if batch.sequences > 1 else []
    fixes += [] if batch.checkpoint_activations else [f"stage{number}.activation_checkpointing: true"]
    fixes += [f"stage{number}.sequence_length", "a larger parallel.ep_size"]
    return (
        f"stage {number}: out of memory on {device_name(device)} with {has:.1f} GB: {held:.1f} GB were allocated, "
        f"{expected:.1f} GB estimated; what lowers it: {', '.join(fixes)}"
    )

"""What to do where a GPU's memory does not hold a stage, with what was expected of it."""

import torch

from pipeline.config.run import RunConfig
from pipeline.distributed.device import device_memory, device_name
from pipeline.distributed.process_group import peak_memory_bytes
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.method.stages import find_stage


def out_of_memory(run: RunConfig, number: int, world_size: int, device: torch.device) -> str:
    """One line.

    Args:
        run: the run's settings.
        number: of the stage.
        world_size: ranks.
        device: whose memory is full.
    """
    stage, estimate = find_stage(run, number), Estimate(run, world_size, Device.of_this_rank(device))
    has, held = device_memory(device) / 1e9, peak_memory_bytes(device) / 1e9
    expected, batch = estimate.memory(stage)["peak"] / 1e9, estimate.batch(stage, estimate.dims)
    fixes = [f"parallel.micro_batch_size below {batch.sequences}"] if batch.sequences > 1 else []
    fixes += [] if batch.checkpoint_activations else [f"stage{number}.activation_checkpointing: true"]
    fixes += [f"stage{number}.sequence_length"] + ([] if run.method.is_dense else ["a larger parallel.ep_size"])
    return (
        f"stage {number}: out of memory on {device_name(device)} with {has:.1f} GB: {held:.1f} GB were allocated, "
        f"{expected:.1f} GB estimated; what lowers it: {', '.join(fixes)}"
    )

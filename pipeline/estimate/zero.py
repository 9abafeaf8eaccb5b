"""Bytes that DeepSpeed's ZeRO keeps for gradients and for what is offloaded, by the optimizer that it takes."""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.training.ds_config import gradient_bytes, offloads

FP32 = 4  # bytes
MOMENTS = 2 * FP32  # Adam's, per parameter
BUCKET = 500_000_000  # DeepSpeed's own reduce_bucket_size, in numbers


@dataclass(frozen=True)
class Gradients:
    """Bytes of one rank.

    Attributes:
        sums: in fp32, with a micro-batch's own where these are kept until they are added.
        buckets: from which they are reduced.
        fresh: of these, what comes only as the activations of a step's only micro-batch go.
    """

    sums: float
    buckets: float = 0.0
    fresh: float = 0.0


def zero_gradients(
    config: dict[str, Any], dtype: torch.dtype, trained: float, held: float, *, on_gpu: bool, accumulates: bool
) -> Gradients:
    """What one rank keeps of gradients, at most.

    In bf16 without offloading, ZeRO-1 has fp32 sums for all that trains, from the first step to the last. Otherwise
    DeepSpeed's optimizer is another one: each gradient is added to its fp32 sum as it comes. At the end of the step,
    or with ZeRO-2 during each backward, gradients go through a bucket of fixed size into the rank's own share.

    Args:
        config: the run's DeepSpeed config.
        dtype: of the weights.
        trained: parameters that train on the rank.
        held: of these, its share.
        on_gpu: where a bucket takes its whole size; a CPU gives memory only to the part that is written.
        accumulates: whether a step has several micro-batches.
    """
    zero, width = config["zero_optimization"], dtype.itemsize
    if zero["stage"] == 1 and dtype == torch.bfloat16 and not offloads(config):
        fresh = trained * (gradient_bytes(config) - FP32)
        return Gradients(FP32 * trained + fresh, fresh=0.0 if accumulates else fresh)
    size = float(zero.get("reduce_bucket_size", BUCKET))
    filled = min(size, trained)
    whole = size if on_gpu else filled
    if zero["stage"] == 2:
        copies = width + (FP32 if width < FP32 else 0)  # what is reduced is a copy, in fp32
        return Gradients(FP32 * held, whole * width + filled * copies, fresh=0.0 if accumulates else FP32 * held)
    sums = FP32 * max(trained, trained - size + held)  # the share grows while sums that are in the bucket go
    return Gradients(sums, whole * FP32, fresh=0.0 if accumulates else sums)


def offloaded(dtype: torch.dtype, held: float) -> dict[str, float]:
    """Bytes of a rank's share that offloading keeps in the host's memory, by kind.

    Beside each fp32 master lies the weight in ``dtype``, on its way to the device; ``gradients`` are in fp32.
    """
    return {"master weights": (FP32 + dtype.itemsize) * held, "gradients": FP32 * held, "moments": MOMENTS * held}

"""The DeepSpeed config of a stage: the file that the run names, with what the run decides filled in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import read_json
from pipeline.config.run import RunConfig, StageConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.stage import Stage
from pipeline.training.monitors import monitor_sections

_FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "scheduler",
)
TOKENS_PER_MICRO_BATCH = {"cpu": 1024, "cuda": 8192}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed config.

    Raises:
        UserError: it is missing, sets what the run decides, or asks for what can't work here.
    """
    if not path.is_file():
        raise UserError(f"deepspeed: {path} does not exist; name a file such as ds_configs/bf16_zero1.json")
    config = read_json(path)
    for key in _FILLED:
        if key in config:
            raise UserError(f"{path}: {key} comes from the run's stage1 and stage2; remove it here")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 is not supported; use bf16, or neither for fp32")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        raise UserError(
            f"{path}: zero_optimization.stage is {zero.get('stage', 0)}; use 1, or 2 with ep_size 1: DeepSpeed clips "
            "experts wrongly at 0, and refuses MoE with 3"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload not in ("none", "cpu") or zero.get("offload_param"):
        raise UserError(f'{path}: only "offload_optimizer": {{"device": "cpu"}} can be offloaded at ZeRO 1 and 2')
    if zero.get("overlap_comm", False):
        raise UserError(
            f"{path}: zero_optimization.overlap_comm can hang where ranks hold unequal experts; set it to false"
        )
    is_bf16 = config.get("bf16", {}).get("enabled", False)
    if is_bf16 and config.get("data_types", {}).get("grad_accum_dtype") != "fp32":
        raise UserError(
            f'{path}: bf16 needs "data_types": {{"grad_accum_dtype": "fp32"}}, or gradients lose small parts'
        )
    if is_bf16 and config.get("communication_data_type") != "fp32":
        raise UserError(
            f'{path}: bf16 needs "communication_data_type": "fp32", or gradients are rounded where ranks are summed'
        )
    return config


def check_zero(config: dict[str, Any], ep_size: int) -> None:
    """Check that the run's ZeRO stage fits its expert parallelism.

    Raises:
        UserError: it does not.
    """
    if config["zero_optimization"]["stage"] == 2 and ep_size > 1:
        raise UserError(
            "zero_optimization.stage 2 can hang where ranks hold unequal experts; use --set parallel.ep_size=1, or 1"
        )


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in the CPU's memory."""
    return bool(config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu")


def training_dtype(config: dict[str, Any]) -> torch.dtype:
    """bf16 or fp32."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def gradient_bytes(config: dict[str, Any]) -> int:
    """Bytes of gradients per weight that trains under ZeRO: fp32 sums, and a micro-batch's until they are added."""
    at_once = config.get("bf16", {}).get("immediate_grad_update", False)
    return torch.float32.itemsize + (0 if at_once else training_dtype(config).itemsize)


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided: ``accumulation`` micro-steps of ``micro_batch`` samples per rank.

    Where that is more than the global batch, the last micro-steps hold samples that count for nothing.
    """

    micro_batch: int
    accumulation: int


def batch_shape(run: RunConfig, stage: StageConfig, world_size: int, device: str) -> BatchShape:
    """The run's micro-batch; for ``auto`` the one within a device's token budget that adds the fewest empty samples.

    Args:
        run: the run's settings.
        stage: the stage's settings.
        world_size: number of ranks.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: the micro-batch is more than a rank's share of the global batch.
    """
    share = -(-stage.global_batch_size // world_size)
    wanted = run.parallel.micro_batch_size
    if wanted != "auto":
        if wanted > share:
            raise UserError(
                f"parallel.micro_batch_size: {wanted} is more than the {share} samples per rank of a global batch "
                f"of {stage.global_batch_size}; use at most {share}, or auto"
            )
        return BatchShape(wanted, -(-share // wanted))
    most = min(share, max(1, TOKENS_PER_MICRO_BATCH[device] // stage.sequence_length))
    shapes = [BatchShape(size, -(-share // size)) for size in range(most, 0, -1)]
    return min(shapes, key=lambda shape: (shape.micro_batch * shape.accumulation, shape.accumulation))


def fill_ds_config(
    config: dict[str, Any], run: RunConfig, stage: Stage, dims: ParallelDims, shape: BatchShape
) -> dict[str, Any]:
    """The config that DeepSpeed gets.

    Args:
        config: what :func:`read_ds_config` read.
        run: the run's settings.
        stage: its learning rate and so on, and what it changes in the config.
        dims: how ranks are divided.
        shape: of the micro-batches.
    """
    check_zero(config, dims.ep_size)
    settings, filled = stage.settings, dict(config)
    filled["train_batch_size"] = dims.world_size * shape.micro_batch * shape.accumulation
    filled["train_micro_batch_size_per_gpu"] = shape.micro_batch
    filled["gradient_accumulation_steps"] = shape.accumulation
    filled["gradient_clipping"] = settings.gradient_clipping
    optimizer = filled.get("optimizer", {"type": "AdamW", "params": {}})
    parameters = {
        "lr": settings.lr,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    filled["optimizer"] = {**optimizer, "params": {**optimizer.get("params", {}), **parameters}}
    return stage.adapt_ds_config(filled) | monitor_sections(run.log, run.folder, stage.name)

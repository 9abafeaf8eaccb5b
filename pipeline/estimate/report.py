"""The estimate of a run, as text."""

import re
from typing import Any

import psutil
import torch

from common.errors import UserError
from common.text_table import aligned
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.activations import measure_layers
from pipeline.estimate.imbalance import mlp_time
from pipeline.estimate.memory import (
    Batch,
    ModelSizes,
    checkpoint_bytes,
    memory_by_kind,
    model_sizes,
    network_per_token,
)
from pipeline.method.allocation import allocate
from pipeline.method.stage import Stage
from pipeline.method.stages import stages_of
from pipeline.model.backbone import model_config, model_folder, parameter_counts
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.metrics import StepRow
from pipeline.records.run_folder import METRICS_FILE, PLAN_FILE, RunFolder
from pipeline.training.ds_config import batch_shape, gradient_bytes, read_ds_config, training_dtype

# Gigabytes of memory (10^9 bytes).
DEVICES = {"a100-40": 42.9, "a100": 85.9, "h100": 85.0, "h200": 151.0, "b200": 192.0, "l40s": 48.3, "mi300x": 206.0,
           "rtx4090": 25.8}  # fmt: skip
USABLE = 0.92  # of a device's memory; the rest goes to the runtime and to gaps between blocks
GPUS_PER_NODE = 8  # where the run's cluster section does not say
GPU_PROCESS = 1_200_000_000  # a CUDA context and NCCL's buffers


class Estimate:
    """What all stages of a run will take.

    Args:
        run: the run's settings.
        dims: how many ranks there are, and how they are divided.
        device: a name of ``DEVICES``, gigabytes such as 80GB, or None for this machine's CPU.

    Raises:
        UserError: the device is unknown, the model can't be found, or its plan can't be known yet.
    """

    def __init__(self, run: RunConfig, dims: ParallelDims, device: str | None) -> None:
        self.run, self.dims = run, dims
        self.capacity = None if device in (None, "cpu") else device_bytes(str(device))
        self.config = model_config(model_folder(run.model))
        ds_config = read_ds_config(run.deepspeed)
        self.dtype, self.gradient_bytes = training_dtype(ds_config), gradient_bytes(ds_config)
        self.sizes: ModelSizes = model_sizes(self.config)
        self.plan, self.plan_note = find_plan(run, self.config.get_text_config().num_hidden_layers)
        self.stages = stages_of(run)
        self.layers = {
            stage.number: measure_layers(self.config, self.plan.top_k, self.dtype, stage) for stage in self.stages
        }
        self.process = GPU_PROCESS if self.capacity else psutil.Process().memory_info().rss

    def batch(self, stage: Stage, dims: ParallelDims) -> Batch:
        """One rank's micro-batch."""
        settings = stage.settings
        shape = batch_shape(self.run, settings, dims.world_size, "cuda" if self.capacity else "cpu")
        return Batch(
            shape.micro_batch, settings.sequence_length, shape.accumulation, settings.activation_checkpointing
        )

    def memory(self, stage: Stage, dims: ParallelDims | None = None) -> dict[str, float]:
        """Bytes of the fullest rank, by the kinds of :func:`memory_by_kind`; ``dims`` replaces the estimate's own."""
        dims = dims or self.dims
        return memory_by_kind(
            self.sizes, self.plan, dims, self.batch(stage, dims), self.layers[stage.number],
            dtype=self.dtype, gradient_bytes=self.gradient_bytes, stage=stage, process=self.process,
        )  # fmt: skip

    def ep_sizes(self) -> list[int]:
        """Those that can be chosen: a group stays within a node, and every rank of it holds an expert."""
        node = self.run.cluster.job("stage1").gpus_per_node or GPUS_PER_NODE
        most = min(self.dims.world_size, node, sum(self.plan.num_new))
        return [size for size in range(1, most + 1) if self.dims.world_size % size == 0]

    def smallest_ep_size(self) -> int | None:
        """The smallest of :meth:`ep_sizes` with which all stages fit the device; None if none does."""
        assert self.capacity is not None
        for ep_size in self.ep_sizes():
            dims = ParallelDims(self.dims.world_size, ep_size)
            if all(self.memory(stage, dims)["peak"] <= USABLE * self.capacity for stage in self.stages):
                return ep_size
        return None

    def text(self, tokens_per_second: float | None) -> str:
        """The whole estimate as text.

        Args:
            tokens_per_second: for the hours; None takes the speed of the steps that the run has done.
        """
        counts = parameter_counts(self.sizes.total, self.sizes.mlp, self.sizes.hidden, self.plan)
        lines = [
            f"model: {counts['dense'] / 1e6:,.1f} M parameters -> {counts['total'] / 1e6:,.1f} M with "
            f"{sum(self.plan.num_new)} new experts; {counts['active'] / 1e6:,.1f} M active per token; "
            f"{counts['stage1_trained'] / 1e6:,.1f} M train in stage 1, {counts['stage2_trained'] / 1e6:,.2f} M in 2",
            f"experts by layer ({self.plan_note}): {' '.join(map(str, self.plan.counts))}",
            f"ranks: {self.dims.world_size}, ep_size {self.dims.ep_size}, {str(self.dtype).removeprefix('torch.')}",
            "",
            self._memory_table(),
            "",
            aligned([["", *(f"stage {stage.number}" for stage in self.stages)], *self._work_rows(tokens_per_second)]),
        ]
        if "unknown" in lines[-1]:
            lines.append("for the hours give --tokens-per-second, or run a few steps: their speed is used")
        if self.dims.world_size > 1:
            lines += ["", self._ep_table()]
        lines += self._ep_warning()
        if self.capacity:
            lines += ["", self._fit_line()]
        return "\n".join(lines)

    def _memory_table(self) -> str:
        found = [self.memory(stage) for stage in self.stages]
        rows = [["GB of the fullest rank", *(f"stage {stage.number}" for stage in self.stages)]]
        for kind in found[0]:
            rows.append([kind, *(f"{memory[kind] / 1e9:.2f}" for memory in found)])
        return aligned(rows)

    def _ep_table(self) -> str:
        """What each ep_size costs: time of the MLPs, and memory."""
        rows = [["ep_size", "MLP time", *(f"peak GB stage {stage.number}" for stage in self.stages)]]
        for size in self.ep_sizes():
            dims = ParallelDims(self.dims.world_size, size)
            peaks = (f"{self.memory(stage, dims)['peak'] / 1e9:.2f}" for stage in self.stages)
            rows.append([str(size), f"x {mlp_time(self.plan, size):.2f}", *peaks])
        return aligned(rows)

    def _ep_warning(self) -> list[str]:
        """A line where ranks of a group hold no expert of a layer, and wait for those that do."""
        few = [layer for layer in self.plan.moe_layers if self.plan.num_new[layer] < self.dims.ep_size]
        if not few:
            return []
        ep_size, time = self.dims.ep_size, mlp_time(self.plan, self.dims.ep_size)
        return [
            f"warning: ep_size {ep_size} is more than the new experts of {len(few)} layers: there some ranks wait for "
            f"others, and MLPs take {time:.2f} x as long as at ep_size 1"
        ]

    def _work_rows(self, tokens_per_second: float | None) -> list[list[str]]:
        network = [
            network_per_token(
                self.sizes, self.plan, self.dims, self.batch(stage, self.dims), dtype=self.dtype, stage=stage
            )
            for stage in self.stages
        ]
        settings = [stage.settings for stage in self.stages]
        rows = [["micro-batch x accumulation", *(self._shape(stage) for stage in self.stages)]]
        for kind in network[0]:
            rows.append([f"network KB per token: {kind}", *(f"{by_kind[kind] / 1e3:.1f}" for by_kind in network)])
        sizes = (checkpoint_bytes(self.sizes, self.plan, self.dims, self.dtype, stage) for stage in self.stages)
        rows.append(["checkpoint GB", *(f"{size / 1e9:.3f}" for size in sizes)])
        rows.append(["tokens", *(f"{stage.tokens:,}" for stage in settings)])
        rows.append(["steps", *(f"{stage.num_steps:,}" for stage in settings)])
        speeds = [tokens_per_second or self._measured_speed(stage) for stage in self.stages]
        rows.append(["tokens per second", *(f"{speed:,.0f}" if speed else "unknown" for speed in speeds)])
        hours = zip(settings, speeds, strict=True)
        rows.append(["hours", *(f"{stage.tokens / speed / 3600:,.2f}" if speed else "-" for stage, speed in hours)])
        return rows

    def _shape(self, stage: Stage) -> str:
        batch = self.batch(stage, self.dims)
        return f"{batch.sequences} x {batch.sequence_length} x {batch.accumulation}"

    def _measured_speed(self, stage: Stage) -> float | None:
        """The median of the steps that the run has done, in tokens per second; None if there is none."""
        rows = StepRow.load_rows(RunFolder(self.run.folder) / stage.name / METRICS_FILE)
        speeds = sorted(row.tokens_per_second for row in rows[1:])
        return speeds[len(speeds) // 2] if speeds else None

    def _fit_line(self) -> str:
        assert self.capacity is not None
        smallest = self.smallest_ep_size()
        device = f"{self.capacity / 1e9:.0f} GB per device, {USABLE:.0%} of it used"
        if smallest is None:
            return (
                f"does not fit {self.dims.world_size} ranks of {device}: use more ranks, a smaller "
                "parallel.micro_batch_size, or activation_checkpointing"
            )
        return f"smallest ep_size that fits {self.dims.world_size} ranks ({device}): {smallest}"


def device_bytes(device: str) -> float:
    """Memory in bytes of a device that a user names.

    Raises:
        UserError: it is neither known nor a number of gigabytes.
    """
    if device.lower() in DEVICES:
        return DEVICES[device.lower()] * 1e9
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|G)?", device, re.IGNORECASE)
    if not size:
        raise UserError(f"--device {device}: unknown; use cpu, {', '.join(DEVICES)}, or gigabytes such as 80GB")
    return float(size[1]) * 1e9


def find_plan(run: RunConfig, num_layers: int) -> tuple[ExpertPlan, str]:
    """The run's plan and where it is from; before similarities are measured, as many experts spread evenly.

    Raises:
        UserError: the number of experts itself depends on similarities.
    """
    path = RunFolder(run.folder) / PLAN_FILE
    if path.is_file():
        plan = ExpertPlan.load(path)
        if plan.num_layers == num_layers:
            return plan, "the run's plan"
    experts, note = run.experts, "as the run lists them"
    if experts.allocation == "layerwise":
        if experts.num_new is None:
            raise UserError(
                "experts.delta: how many experts it gives depends on the similarities; "
                "python -m pipeline run RUN.yaml --until allocate first"
            )
        experts = experts.model_copy(update={"allocation": "uniform", "rounding": "largest_remainder"})
        note = "spread evenly, as similarities are not measured yet"
    counts = allocate(experts, num_layers, None).counts
    layers = experts.classifier_layers
    moe = [layer for layer, count in enumerate(counts) if count > 1]
    return (
        ExpertPlan.first_expansion(
            counts,
            old=sorted({entry.language for entry in run.data.old.values()}),
            new=sorted({entry.language for entry in run.data.new.values()}),
            top_k=experts.top_k,
            classifier_layers=moe[:layers] if isinstance(layers, int) else layers,
        ),
        note,
    )


def estimate(run: RunConfig, options: Any) -> int:
    """``python -m pipeline estimate``."""
    ranks = run.parallel.ranks if options.ranks is None else options.ranks
    fitting = run.parallel.ep_size if ranks % run.parallel.ep_size == 0 else 1
    ep_size = fitting if options.ep_size is None else options.ep_size
    torch.manual_seed(0)
    print(Estimate(run, ParallelDims.from_options(ranks, ep_size), options.device).text(options.tokens_per_second))
    return 0

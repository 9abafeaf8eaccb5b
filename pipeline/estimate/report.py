"""The estimate of a run, as text."""

import copy
import math
from dataclasses import replace
from typing import Any

import torch

from common.text_table import aligned
from data_prep.encoders import find_extension
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.estimate.activations import BaselineActivations, LayerActivations, measure_baseline, measure_layers
from pipeline.estimate.device import Device
from pipeline.estimate.imbalance import mlp_time
from pipeline.estimate.memory import (
    Batch,
    ModelSizes,
    checkpoint_bytes,
    memory_by_kind,
    model_sizes,
    most_experts,
    network_per_token,
)
from pipeline.estimate.plan import find_plan
from pipeline.method.stage import Stage
from pipeline.method.stages import stages_of
from pipeline.method.untrained import dense_parameter_counts
from pipeline.model.backbone import parameter_counts
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.model_folder import model_config, model_folder
from pipeline.records.checkpoint import NewRows
from pipeline.records.metrics import StepRow
from pipeline.records.run_folder import METRICS_FILE, RunFolder
from pipeline.training.ds_config import batch_shape, read_ds_config, training_dtype

USABLE = 0.92  # of a device's memory; the rest goes to the runtime and to gaps between blocks
GPUS_PER_NODE = 8  # where the run's cluster section does not say


class Estimate:
    """What all stages of a run will take.

    Args:
        run: the run's settings.
        world_size: ranks.
        device: of each rank.
        per_node: ranks per node; without it as many as the run's cluster section says.
        ep_size: of the groups; without it the run's, or for ``auto`` the smallest that fits.
        num_new: new experts of the whole model, where the run leaves their number to similarities not yet measured.

    Raises:
        UserError: the model can't be found, its plan can't be known yet, or the ranks can't be divided so.
    """

    def __init__(
        self,
        run: RunConfig,
        world_size: int,
        device: Device,
        *,
        per_node: int | None = None,
        ep_size: int | None = None,
        num_new: int | None = None,
    ) -> None:
        self.run, self.world_size, self.device = run, world_size, device
        self.per_node = per_node or run.cluster.job("stage1").gpus_per_node or GPUS_PER_NODE
        self.config = model_config(model_folder(run.model))
        self.ds_config = read_ds_config(run.ds_config_file)
        self.dtype = training_dtype(self.ds_config)
        self.sizes: ModelSizes = model_sizes(self.config, rows_of(run, self.config))
        if run.method.is_dense:
            counts = self.counts()
            self.sizes = replace(self.sizes, total=counts["total"], trained=counts["stage1_trained"])
        self.plan, self.plan_note = find_plan(run, self.config.get_text_config().num_hidden_layers, num_new)
        self.stages = stages_of(run)
        self.layers = {stage.number: self._measure_layers(stage) for stage in self.stages}
        self.process = device.process
        self._given_ep_size = ep_size
        self.dims = self._dims(ep_size or self._ep_size())

    def counts(self) -> dict[str, int]:
        """Numbers of parameters by kind; see :func:`pipeline.model.backbone.parameter_counts`."""
        if self.run.method.is_dense:
            return dense_parameter_counts(self.config, self.run.method)
        sizes = self.sizes
        return parameter_counts(
            sizes.total, sizes.mlp, sizes.hidden, self.plan, new_rows=sizes.new_rows, rows_train=sizes.rows_train
        )

    def _measure_layers(self, stage: Stage) -> LayerActivations | BaselineActivations:
        if self.run.method.is_dense:
            return measure_baseline(self.config, self.dtype, self.run.method)
        return measure_layers(self.config, self.plan.top_k, self.dtype, stage)

    def batch(self, stage: Stage, dims: ParallelDims) -> Batch:
        """One rank's micro-batch."""
        settings = stage.settings
        shape = batch_shape(self.run, settings, dims.world_size, self.device.type)
        return Batch(
            shape.micro_batch, settings.sequence_length, shape.accumulation, settings.activation_checkpointing
        )

    def memory(self, stage: Stage, dims: ParallelDims | None = None) -> dict[str, float]:
        """Bytes of the fullest rank, by the kinds of :func:`memory_by_kind`; ``dims`` replaces the estimate's own."""
        dims = dims or self.dims
        return memory_by_kind(
            self.sizes, self.plan, dims, self.batch(stage, dims), self.layers[stage.number],
            dtype=self.dtype, ds_config=self.ds_config, stage=stage, process=self.process,
            on_gpu=self.device.type == "cuda",
        )  # fmt: skip

    def on(self, world_size: int) -> "Estimate":
        """The same run on another number of ranks; its model is not measured again."""
        other = copy.copy(self)
        other.world_size = world_size
        other.dims = other._dims(other._ep_size())
        return other

    def with_plan(self, plan: ExpertPlan) -> "Estimate":
        """The same run with another plan of as many experts per token; its model is not measured again."""
        other = copy.copy(self)
        other.plan = plan
        other.dims = other._dims(self._given_ep_size or other._ep_size())
        return other

    def _dims(self, ep_size: int) -> ParallelDims:
        return ParallelDims(self.world_size, ep_size, max_imbalance=self.run.parallel.max_imbalance)

    def _ep_size(self) -> int:
        wanted = self.run.parallel.ep_size
        if self.run.method.is_dense:
            return 1
        if wanted != "auto":
            return wanted
        return 1 if self.device.capacity is None else self.smallest_ep_size() or self.leanest_ep_size()

    def ep_sizes(self) -> list[int]:
        """Those that can be chosen: a group stays within a node; ZeRO-2 and a model without experts take 1 alone."""
        if self.run.method.is_dense or self.ds_config["zero_optimization"]["stage"] == 2:
            return [1]
        return [size for size in range(1, min(self.world_size, self.per_node) + 1) if self.world_size % size == 0]

    def peak(self, ep_size: int) -> float:
        """Bytes of the fullest rank in the stage that takes most."""
        return max(self.memory(stage, self._dims(ep_size))["peak"] for stage in self.stages)

    def smallest_ep_size(self) -> int | None:
        """The smallest of :meth:`ep_sizes` with which all stages fit the device; None if none does."""
        assert self.device.capacity is not None
        most = USABLE * self.device.capacity
        return next((ep_size for ep_size in self.ep_sizes() if self.peak(ep_size) <= most), None)

    def leanest_ep_size(self) -> int:
        """The one of :meth:`ep_sizes` that takes the least memory."""
        return min(self.ep_sizes(), key=self.peak)

    def _of_rows(self) -> str:
        return f" and {self.sizes.new_rows / 1e6:,.1f} M of new tokens' rows" if self.sizes.new_rows else ""

    def text(self, tokens_per_second: float | None) -> str:
        """The whole estimate as text.

        Args:
            tokens_per_second: for the hours; None takes the speed of the steps that the run has done.
        """
        lines = [
            *self._model_lines(),
            f"ranks: {self.dims.world_size}, ep_size {self.dims.ep_size}, {str(self.dtype).removeprefix('torch.')}",
            "",
            self._memory_table(),
            "",
            aligned([["", *(f"stage {stage.number}" for stage in self.stages)], *self._work_rows(tokens_per_second)]),
        ]
        if "unknown" in lines[-1]:
            lines.append("for the hours give --tokens-per-second, or run a few steps: their speed is used")
        if self.world_size > 1 and not self.run.method.is_dense:
            lines += ["", self._ep_table()]
        lines += self._ep_warning()
        if self.device.capacity is not None:
            lines += ["", self.fit_line()]
        return "\n".join(lines)

    def _model_lines(self) -> list[str]:
        counts = self.counts()
        before, total = (f"{counts[key] / 1e6:,.1f} M" for key in ("dense", "total"))
        if self.run.method.is_dense:
            trained = f"{counts['stage1_trained'] / 1e6:,.1f} M train"
            return [f"model: {before} parameters -> {total} with method {self.run.method.name}; {trained}"]
        review = f"{counts['stage2_trained'] / 1e6:,.2f} M"
        trained = f"{counts['stage1_trained'] / 1e6:,.1f} M train in stage 1, {review} in 2"
        if self.run.stage1 is None:
            trained = f"{review} train in stage 2"
        return [
            f"model: {before} parameters -> {total} with "
            f"{sum(self.plan.num_new)} new experts{self._of_rows()}; "
            f"{counts['active'] / 1e6:,.1f} M active per token; {trained}",
            f"experts by layer ({self.plan_note}): {' '.join(map(str, self.plan.counts))}",
        ]

    def _memory_table(self) -> str:
        found = [self.memory(stage) for stage in self.stages]
        rows = [["GB of the fullest rank", *(f"stage {stage.number}" for stage in self.stages)]]
        for kind in found[0]:
            rows.append([kind, *(f"{memory.get(kind, 0.0) / 1e9:.2f}" for memory in found)])
        return aligned(rows)

    def _ep_table(self) -> str:
        """What each ep_size costs: time of the MLPs, and memory; without a limit to the imbalance it may take less."""
        rows = [["ep_size", "MLP time", "experts/rank", *(f"peak GB stage {stage.number}" for stage in self.stages)]]
        for size in self.ep_sizes():
            rows.append(self._ep_row(str(size), self._dims(size)))
            unlimited = replace(self._dims(size), max_imbalance=math.inf)
            if mlp_time(self.plan, unlimited) > mlp_time(self.plan, self._dims(size)):
                rows.append(self._ep_row(f"{size}, any imbalance", unlimited))
        return aligned(rows)

    def _ep_row(self, name: str, dims: ParallelDims) -> list[str]:
        peaks = (f"{self.memory(stage, dims)['peak'] / 1e9:.2f}" for stage in self.stages)
        experts = sum(most_experts(self.plan, dims).values())
        return [name, f"x {mlp_time(self.plan, dims):.2f}", str(experts), *peaks]

    def _ep_warning(self) -> list[str]:
        """A line where layers have fewer experts than a group has ranks: they wait, or experts are replicated."""
        few = sum(0 < num < self.dims.ep_size for num in self.plan.num_new)
        if not few:
            return []
        ep_size, time = self.dims.ep_size, mlp_time(self.plan, self.dims)
        return [
            f"warning: ep_size {ep_size} is more than the new experts of {few} layers: theirs are on several ranks of "
            f"a group; MLPs take {time:.2f} x as long as at ep_size 1"
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

    def fit_line(self) -> str:
        """The smallest ep_size that fits, or what to lower."""
        assert self.device.capacity is not None
        smallest = self.smallest_ep_size()
        device = f"{self.device.capacity / 1e9:.0f} GB per device, {USABLE:.0%} of it used"
        if smallest is None:
            spread = "" if self.run.method.is_dense else ", or a larger parallel.max_imbalance"
            return (
                f"does not fit {self.world_size} ranks of {device}: use more ranks, a smaller "
                f"parallel.micro_batch_size, activation_checkpointing{spread}"
            )
        if self.run.method.is_dense:
            return f"fits {self.world_size} ranks ({device})"
        return f"smallest ep_size that fits {self.world_size} ranks ({device}): {smallest}"


def rows_of(run: RunConfig, config: Any) -> NewRows | None:
    """The rows that a model gets for the tokens which the run's tokenizer adds to its own.

    Raises:
        UserError: the tokenizer does not extend the model's.
    """
    found = find_extension(run.preparation, config.get_text_config().vocab_size)
    if found is None:
        return None
    return NewRows(first=found.first, count=found.count, tokenizer="", train=run.base is None)


def estimate_of(
    run: RunConfig,
    *,
    ranks: int | None = None,
    ep_size: int | None = None,
    device: str | None = None,
    num_new: int | None = None,
) -> Estimate:
    """The estimate that options of the command line ask for; each that is None is as the run says.

    Raises:
        UserError: see :class:`Estimate`; or the device is unknown.
    """
    world_size = run.parallel.ranks if ranks is None else ranks
    wanted = None if run.parallel.ep_size == "auto" else run.parallel.ep_size
    fitting = 1 if wanted is not None and world_size % wanted else wanted
    given = fitting if ep_size is None else ep_size
    ParallelDims.from_options(world_size, 1 if given is None else given)
    torch.manual_seed(0)
    return Estimate(run, world_size, Device.named(device), ep_size=given, num_new=num_new)


def estimate(run: RunConfig, options: Any) -> int:
    """``python -m pipeline estimate``."""
    found = estimate_of(
        run, ranks=options.ranks, ep_size=options.ep_size, device=options.device, num_new=options.num_new
    )
    print(found.text(options.tokens_per_second))
    return 0

"""TrainingState: a stage in training on one rank: its engine and samples, and how far it has come."""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.checkpoint.verify import check_sound, weight_files
from pipeline.checkpoint.weights import files_read_once
from pipeline.config.run import StageConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.method.stage import Stage
from pipeline.records.evaluation import SetScore
from pipeline.records.run_folder import INPUTS_FILE
from pipeline.training.ds_config import BatchShape, batch_shape
from pipeline.training.engine import build_engine
from pipeline.training.inputs import StageInputs
from pipeline.training.rank_log import RankLog
from pipeline.training.sample_order import SampleOrder, stage_order
from pipeline.training.samples_ahead import Places, SamplesAhead
from pipeline.training.skipped_steps import SkippedSteps
from pipeline.training.slowest_rank import watch_backward
from pipeline.training.utilization import flops_per_token, peak_flops


@dataclass
class TrainingState:
    """All that the functions of this folder work on.

    Attributes:
        inputs: what the stage starts from.
        ranks: this process among the others.
        dims: how ranks are divided.
        shape: of the micro-batches.
        order: all samples of the stage.
        samples: this rank's, read ahead.
        engine: DeepSpeed's.
        skipped_steps: which steps are skipped, and how many were.
        rank_log: what this rank notes of itself.
        hosts: the name of each rank's node.
        step: number of optimizer steps taken, skipped ones included.
        best_value: the lowest mean of bits per character of any validation.
        best_tag: the checkpoint that it was measured on; empty if there is none.
        saved_tag: the newest checkpoint that was read or written; empty if there is none.
        base_scores: by set of an old language, the base model's scores; empty where they are not known.
        step_started: when the step that is being taken began, by time.monotonic().
        step_seconds: how long the last step took; None before the first.
    """

    inputs: StageInputs
    ranks: Ranks
    shape: BatchShape
    order: SampleOrder
    samples: SamplesAhead
    engine: Any
    skipped_steps: SkippedSteps
    rank_log: RankLog
    hosts: list[str]
    step: int = 0
    best_value: float = math.inf
    best_tag: str = ""
    saved_tag: str = ""
    base_scores: dict[str, SetScore] = field(default_factory=dict)
    step_started: float = 0.0
    step_seconds: float | None = None

    @classmethod
    def start(cls, inputs: StageInputs, ranks: Ranks) -> "TrainingState":
        """Check what the stage reads, load the model and build the engine; no step is taken.

        Raises:
            AgreedError: weights that the stage starts from are damaged.
            UserError: a setting does not fit the ranks or the data.
        """
        run, settings = inputs.run, inputs.stage.settings
        order = stage_order(inputs.store, run.data, inputs.stage, inputs.plan, run.seed)
        shape = batch_shape(run, settings, ranks.world_size, ranks.device.type)
        _check_weights(inputs, ranks)
        engine = build_engine(inputs, shape)
        watch_backward(engine)
        inputs.folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_first:
            inputs.done_with.save(inputs.folder / INPUTS_FILE)
        rank_log = RankLog(inputs.folder, ranks.rank, list(run.cluster.environment), writes=run.log.ranks)
        places = Places(
            settings.global_batch_size, shape.micro_batch, shape.accumulation, ranks.world_size, ranks.rank
        )
        samples = SamplesAhead(order, places, pin=ranks.device.type == "cuda")
        skipped_steps = SkippedSteps(run.bad_steps, engine)
        return cls(inputs, ranks, shape, order, samples, engine, skipped_steps, rank_log, ranks.hosts())

    def close(self) -> None:
        """Let go of the engine, which DeepSpeed's hooks would keep, and stop reading."""
        self.samples.close()
        self.engine.destroy()

    @property
    def stage(self) -> Stage:
        """Which stage it is."""
        return self.inputs.stage

    @property
    def dims(self) -> ParallelDims:
        """How the ranks are divided."""
        return self.inputs.dims

    @property
    def settings(self) -> StageConfig:
        """The stage's settings."""
        return self.inputs.stage.settings

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.settings.global_batch_size * self.settings.sequence_length

    @property
    def progress(self) -> dict[str, Any]:
        """How far it has come: ``step``, ``samples``, ``tokens``; the beginning of each row of metrics."""
        samples = self.step * self.settings.global_batch_size
        return {"step": self.step, "samples": samples, "tokens": self.step * self.batch_tokens}

    @property
    def tag(self) -> str:
        """The name of a checkpoint taken now."""
        return f"step{self.step:06d}"

    @property
    def seconds_left(self) -> float | None:
        """Until the step ends that is being taken, if it takes as long as the last; None before the first."""
        if self.step_seconds is None:
            return None
        return max(0.0, self.step_started + self.step_seconds - time.monotonic())

    def utilization(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization at a speed of all ranks together; None where the device's peak is not known."""
        if self._peak_flops is None:
            return None
        return tokens_per_second * self._flops_per_token / (self._peak_flops * self.ranks.world_size)

    @cached_property
    def _peak_flops(self) -> float | None:
        return peak_flops(self.inputs.run.log, self.ranks.device, self.engine.module.dtype)

    @cached_property
    def _flops_per_token(self) -> float:
        return flops_per_token(self.engine.module, self.settings.sequence_length)

    def say(self, text: str) -> None:
        """Print a line about this stage, on rank 0."""
        self.ranks.say(f"stage {self.stage.number}: {text}")

    def at(self, where: str) -> None:
        """Tell the watchdog how far this rank has come."""
        self.ranks.at(f"stage {self.stage.number}, {where}")


def _check_weights(inputs: StageInputs, ranks: Ranks) -> None:
    """Verify the files that the stage starts from, on all ranks."""
    inputs.untrained.check(ranks, inputs.dims)
    if inputs.stage1_checkpoint is not None:
        weights, loads = weight_files(inputs.stage1_checkpoint), files_read_once(inputs.plan, inputs.dims)
        check_sound(inputs.stage1_checkpoint, ranks, "train stage 1 again with --force", weights, loads)

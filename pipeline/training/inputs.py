"""StageInputs: what the training of a stage starts from."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.stage import Stage
from pipeline.method.untrained import Untrained
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointIdentity
from pipeline.records.step_manifest import StepInputs


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from.

    Attributes:
        run: the run's settings.
        stage: which stage, with its settings.
        plan: the experts of the model.
        store: the tokens.
        untrained: the model before its first step.
        folder: where checkpoints and metrics of the stage go.
        identity: what its checkpoints are of.
        done_with: all that its result depends on.
        dims: how ranks are divided.
        stage1_checkpoint: for stage 2, the folder of the stage-1 checkpoint that holds the experts.
    """

    run: RunConfig
    stage: Stage
    plan: ExpertPlan
    store: TokenStore
    untrained: Untrained
    folder: Path
    identity: CheckpointIdentity
    done_with: StepInputs
    dims: ParallelDims
    stage1_checkpoint: Path | None = None

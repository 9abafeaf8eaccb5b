"""The stages that a run has."""

from pipeline.config.run import RunConfig
from pipeline.method.dense_stage import DenseStage
from pipeline.method.stage import Stage
from pipeline.method.stage1 import Stage1
from pipeline.method.stage2 import Stage2

STAGES: dict[int, type[Stage]] = {kind.number: kind for kind in (Stage1, Stage2)}


def find_stage(run: RunConfig, number: int) -> Stage:
    """One stage, by its number.

    Raises:
        UserError: the run has no such stage.
    """
    if run.method.is_dense:
        run.stage(number)  # it has stage 1 alone
        assert run.stage1 is not None
        return DenseStage(run.stage1, method=run.method)
    return STAGES[number](run.stage(number))


def stages_of(run: RunConfig) -> list[Stage]:
    """All stages that the run has, in order."""
    return [find_stage(run, number) for number in run.stage_numbers]

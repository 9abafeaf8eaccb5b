"""``compare.json``: several runs side by side."""

from pipeline.records.evaluation import Change
from pipeline.records.record import Record
from pipeline.records.task_score import Figure


class Spread(Record):
    """A figure of several runs.

    Attributes:
        mean: over the runs.
        deviation: the sample standard deviation; None for a single run.
    """

    mean: float
    deviation: float | None


class ComparedRun(Record):
    """One run.

    Attributes:
        name: the run's; its folder where two runs have the same name.
        folder: its folder.
        seed: its seed.
        group: the name of the runs that differ from it by seed alone, itself included.
        checkpoint: what is compared with the base model: its last stage's.
        new: by set of a new language, the change of bits per character against the base model.
        old: the same by set of an old language.
        watch: the same by watched set.
        means: of the changes in percent, over the sets of ``new`` and of ``old``; no key where there is no set.
        parameters: numbers of parameters: dense, total, active, stage1_trained, stage2_trained.
        tokens: by stage, how many it was trained on.
        flops: floating-point operations of training, see :func:`pipeline.training.utilization.flops_per_token`; None
            where the model's config is not there any more.
        seconds: of training, all stages' steps; None where a stage left no such figure.
        tasks: the first metric of each task of lm-eval's, by task, metric and number of examples.
    """

    name: str
    folder: str
    seed: int
    group: str
    checkpoint: str
    new: dict[str, Change]
    old: dict[str, Change]
    watch: dict[str, Change]
    means: dict[str, float]
    parameters: dict[str, int]
    tokens: dict[str, int]
    flops: float | None
    seconds: float | None
    tasks: dict[str, Figure] = {}

    @property
    def changes(self) -> dict[str, Change]:
        """Of all sets, by name."""
        return {**self.new, **self.old, **self.watch}


class ComparedGroup(Record):
    """Runs that differ by seed alone.

    Attributes:
        name: the group's.
        runs: their names.
        means: as a run's.
        changes: by set, of the changes in percent.
        seconds: of training; None where one of the runs has none.
    """

    name: str
    runs: list[str]
    means: dict[str, Spread]
    changes: dict[str, Spread]
    seconds: Spread | None


class Comparison(Record):
    """The whole file.

    Attributes:
        runs: in the order in which they were named, those of a group together.
        groups: in the same order; a run that is alone is a group of one.
        against: the name of the run that others are paired with; None if there is none.
        paired: by run and set, the change of bits against that run, over the same documents.
        notes: what a reader has to know, each a sentence.
    """

    runs: list[ComparedRun]
    groups: list[ComparedGroup]
    against: str | None
    paired: dict[str, dict[str, Change]]
    notes: list[str]

"""``evaluation.json``: bits per character of every checkpoint on every set, and how tokens were routed."""

from typing import Literal

import numpy as np

from pipeline.records.record import Record
from pipeline.records.task_score import TaskScores

BASE = "base"  # the dense model's name among the checkpoints
Group = Literal["new", "old", "watch"]
ROUNDING = 0.05  # percent
GROUPS: tuple[Group, ...] = ("new", "old", "watch")  # in the order in which people read them


class SetScore(Record):
    """A model's score on one set; a file of the cache of scores.

    Attributes:
        bits: by document, summed over its tokens.
        characters: by document.
        expert_0_share: for each MoE layer, the share of tokens whose output uses expert 0.
        probability_0: for each MoE layer, the mean router probability of expert 0.
        classified_old: for each MoE layer, the share of tokens that its classifier calls old; 0 where it has none.
        own_experts: the share of routing weight, the mean over MoE layers, on experts that existed after the round of
            the set's language; None where the model does not know the language or has no MoE layer.
    """

    bits: list[float]
    characters: list[int]
    expert_0_share: list[float]
    probability_0: list[float]
    classified_old: list[float]
    own_experts: float | None = None

    @property
    def bits_per_character(self) -> float:
        """Over all documents together."""
        return float(np.sum(self.bits) / np.sum(self.characters))


class ValidationBase(Record):
    """``validation_base.json``: the dense model's scores, which validations are compared with.

    Attributes:
        key: of the texts, the model and how they were scored.
        sets: by set of an old language.
    """

    key: str
    sets: dict[str, SetScore]


class Change(Record):
    """Bits per character against the base model's: the dense one's, or the run's that was expanded further.

    Attributes:
        percent: the change of the total bits.
        interval: half the width of its 95 % interval over documents, in percent; None for a single document.
    """

    percent: float
    interval: float | None

    @property
    def is_worse(self) -> bool:
        """Whether it takes more bits than the base model, beyond the interval and beyond rounding."""
        return self.interval is not None and self.percent > max(self.interval, ROUNDING)


class Continued(Record):
    """What a model goes on with, by prompt; a file of the cache."""

    texts: dict[str, str]


class Continuation(Record):
    """How models go on from a prompt.

    Attributes:
        name: of the prompt.
        prompt: the beginning of a text.
        texts: by checkpoint, the base model's first.
    """

    name: str
    prompt: str
    texts: dict[str, str]


class SetResult(Record):
    """One set.

    Attributes:
        group: new, old or watch.
        language: of its text.
        documents: how many were scored.
        characters: of all documents.
        bits_per_character: by checkpoint.
        change: by checkpoint, the dense model left out.
        bits_by_document: by checkpoint, in the order of ``pages``.
        pages: the name of each document's page.
    """

    group: Group
    language: str
    documents: int
    characters: int
    bits_per_character: dict[str, float]
    change: dict[str, Change]
    bits_by_document: dict[str, list[float]]
    pages: list[str]


class Shares(Record):
    """How one checkpoint routes one set, a value per layer with a router.

    Attributes:
        expert_0_share: share of tokens whose output uses expert 0.
        probability_0: mean router probability of expert 0.
        classified_old: share of tokens that the layer's classifier calls old; 0 where it has none.
    """

    expert_0_share: list[float]
    probability_0: list[float]
    classified_old: list[float]


class StageRouting(Record):
    """How one checkpoint routes held-out text.

    Attributes:
        layers: the decoder layers that have a router.
        sets: by set.
    """

    layers: list[int]
    sets: dict[str, Shares]


class Evaluation(Record):
    """The whole file.

    Attributes:
        window: tokens per scoring window.
        checkpoints: what was scored, the dense model ("base") first.
        sets: by name.
        routing: by checkpoint, the dense model left out; empty where there are no routers.
        own_experts: by set of an earlier round's language, by checkpoint: how much of its routing weight is on the
            experts of its time; empty for a dense model's first expansion.
        parameters: numbers of parameters: dense, total, active, stage1_trained and, of a mixture, stage2_trained.
        tasks: by task of lm-eval's, by checkpoint; empty until ``evaluate --tasks`` is asked for.
        continuations: how the base model and the last checkpoint go on from the run's prompts.
    """

    window: int
    checkpoints: list[str]
    sets: dict[str, SetResult]
    routing: dict[str, StageRouting]
    own_experts: dict[str, dict[str, float]] = {}
    parameters: dict[str, int]
    tasks: TaskScores = {}
    continuations: list[Continuation] = []

    def forgotten(self, checkpoint: str) -> dict[str, Change]:
        """The sets of old languages, watched ones too, that a checkpoint scores worse than the base model."""
        old = {result.language for result in self.sets.values() if result.group == "old"}
        return {
            name: result.change[checkpoint]
            for name, result in self.sets.items()
            if result.group != "new"
            and result.language in old
            and checkpoint in result.change
            and result.change[checkpoint].is_worse
        }

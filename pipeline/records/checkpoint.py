"""``manifest.json`` of a folder of weights: what they are of, and every file's size and hash."""

from typing import Any

from pipeline.records.record import Record


class FileEntry(Record):
    """One file: its size in bytes and its sha256, in hex."""

    bytes: int
    sha256: str


class Manifest(Record):
    """Of any folder of weights. ``files`` are by their names in the folder."""

    files: dict[str, FileEntry] = {}


UPCYCLED_TAG = "upcycled"  # in an upcycled checkpoint's folder, where its weights are
HF_FOLDER = "hf"  # there, config and tokenizer, so that training does not need the dense model


class NewRows(Record):
    """Embedding and head rows for the tokens that a run's tokenizer adds to the model's own.

    Attributes:
        first: the id of the first new token.
        count: how many there are.
        tokenizer: the extended tokenizer's content key.
        train: whether they train in stage 1; in a further expansion they are frozen.
    """

    first: int
    count: int
    tokenizer: str
    train: bool = True


class UpcycledManifest(Manifest):
    """Of the untrained mixture.

    Attributes:
        model: the dense model's content key.
        plan: the expert plan.
        seed: of the routers.
        parity: the receipt: ``max_abs_logit_difference``, ``max_abs_logit``, ``tolerance``, ``tokens``, ``holds``.
        dtype: of the weights.
        dense_parameters: of the dense model.
        mlp_parameters: of one layer's MLP.
        hidden_size: D.
        new_rows: for new tokens; None where the tokenizer is the model's own.
        new_row_parameters: of all new rows, the head's included where it is not tied.
        copied: of a further expansion whose new experts are copies of the most used one, its number in each layer.
        selection_biases: of a further expansion, whether its base was balanced by them: routers keep theirs.
    """

    model: str
    plan: dict[str, Any]
    seed: int
    parity: dict[str, float | int | bool]
    dtype: str
    dense_parameters: int
    mlp_parameters: int
    hidden_size: int
    new_rows: NewRows | None = None
    new_row_parameters: int = 0
    copied: list[int] | None = None
    selection_biases: bool = False

    @property
    def holds_experts(self) -> bool:
        """Whether all experts have files; one that has none is a copy of its layer's MLP."""
        return sum("_expert_" in name for name in self.files) == sum(count - 1 for count in self.plan["counts"])


class ExpertsFrom(Record):
    """The checkpoint of an earlier stage that holds the experts: its tag, and its manifest's sha256."""

    tag: str
    manifest: str


class CheckpointIdentity(Record):
    """What the checkpoints of a stage are of, by content keys.

    Attributes:
        model: of the dense model.
        plan: of the part of the expert plan that the stage depends on.
        tokenizer: of the tokenizer.
        settings: of all that the stage's result depends on.
        stage1: for stage 2, where its experts lie.
    """

    model: str
    plan: str
    tokenizer: str
    settings: str = ""
    stage1: ExpertsFrom | None = None


class CheckpointManifest(Manifest):
    """Of a training checkpoint.

    Attributes:
        identity: what it is of.
        stage: 1 or 2.
        step: optimizer steps taken.
        samples: samples of all ranks consumed.
        best_value: the lowest mean of bits per character so far; None if none was measured.
        best_tag: the checkpoint that it was measured on; empty if there is none.
        skipped_steps: the state of :class:`pipeline.training.skipped_steps.SkippedSteps`.
        ranks: how many saved it.
        ep_size: ranks per expert-parallel group.
        max_imbalance: see :class:`pipeline.distributed.parallel_dims.ParallelDims`, as for the two before.
        expert_plan: the expert plan.
        method: the name of the run's.
        selection_biases: whether its routers have a selection bias.
        resized_from: the tag that it was made from by ``resize``.
    """

    identity: CheckpointIdentity
    stage: int
    step: int
    samples: int
    best_value: float | None
    best_tag: str
    skipped_steps: dict[str, Any]
    ranks: int
    ep_size: int
    max_imbalance: float
    expert_plan: dict[str, Any]
    method: str = "moe"
    selection_biases: bool = False
    resized_from: str | None = None

"""What training records: a row per optimizer step, a row per validation, and which checkpoint is the best."""

from pipeline.records.record import Record


class SlowestRank(Record):
    """A rank that others wait for.

    Attributes:
        rank: its number.
        host: of its node.
        percent: how much longer it worked than the median of the other ranks.
    """

    rank: int
    host: str
    percent: float

    @property
    def name(self) -> str:
        """Its host and number, such as node7:59."""
        return f"{self.host}:{self.rank}"


class StepRow(Record):
    """A row of ``metrics.jsonl``: one optimizer step.

    Attributes:
        step: optimizer steps taken, this one included.
        samples: samples of all ranks so far.
        tokens: tokens of all ranks so far.
        loss: by kind (next_token, balance, lpr, classifier; where they are on, router_z, router_kl), each a mean over
            the global batch, in nats.
        expert_0_share: by set, the share of its tokens whose output uses expert 0, mean over layers.
        load_imbalance: per layer with a router, the busiest expert's tokens over the mean; 1 is balanced.
        lr: the learning rate of this step.
        grad_norm: of the global batch's gradient, before clipping.
        skipped: why the step was skipped; None where it was taken.
        tokens_per_second: of all ranks.
        memory_gb: the most memory this rank has used, in 10^9 bytes.
        seconds: what the step took.
        data_seconds: of which rank 0 waited for samples to be read.
        mfu: model FLOPs utilization, see :mod:`pipeline.training.utilization`; None where the device's peak is not
            known.
        slowest_rank: the one that worked longest before the step's gradients were reduced, where it is far behind,
            see :mod:`pipeline.training.slowest_rank`; else None.
    """

    step: int
    samples: int
    tokens: int
    loss: dict[str, float]
    expert_0_share: dict[str, float]
    load_imbalance: list[float]
    lr: float
    grad_norm: float
    skipped: str | None
    tokens_per_second: float
    memory_gb: float
    seconds: float
    data_seconds: float = 0.0
    mfu: float | None = None
    slowest_rank: SlowestRank | None = None


class ValidationRow(Record):
    """A row of ``validation.jsonl``.

    Attributes:
        step: optimizer steps taken.
        samples: samples of all ranks so far.
        tokens: tokens of all ranks so far.
        sets: bits per character by set.
        mean: over the new and old sets.
        best: whether no validation before it was as good.
        forgotten: by set of an old language that is worse than the base model, beyond its interval, the percent.
    """

    step: int
    samples: int
    tokens: int
    sets: dict[str, float]
    mean: float
    best: bool
    forgotten: dict[str, float] = {}


class Best(Record):
    """``best.json``: the checkpoint that validated best, and its mean bits per character."""

    tag: str
    bits_per_character: float

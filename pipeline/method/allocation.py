"""How many experts each layer gets (LayerMoE, arXiv 2505.22582, sections 3.2 and 3.3)."""

import math
from dataclasses import dataclass

from common.errors import UserError
from pipeline.config.experts import ExpertsConfig
from pipeline.config.run import RunConfig
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.run_folder import PLAN_FILE

SMALLEST_SIMILARITY = 1e-3

MOLA = (2, 4, 6, 8)  # experts of the layers in each quarter, from the bottom (MoLA-inverted, arXiv 2402.08562)


@dataclass(frozen=True)
class Allocation:
    """How many experts each layer gets.

    Attributes:
        counts: N_l of each layer, the original included.
        delta: the paper's, if its formula gave them.
        note: one line for the user: how the budget was met.
    """

    counts: list[int]
    delta: float | None
    note: str


def allocate(experts: ExpertsConfig, num_layers: int, similarity: list[float] | None, ep_size: int = 1) -> Allocation:
    """Divide the budget over the layers as the run says.

    Args:
        experts: the run's section.
        num_layers: L.
        similarity: S_l of each layer (positive); only ``layerwise`` needs it.
        ep_size: ranks per expert-parallel group; only ``rounding: expert_parallel`` needs it.

    Raises:
        UserError: a list has the wrong length, the budget can't be met, or a similarity is not positive.
    """
    if experts.allocation == "explicit":
        counts = list(experts.counts or [])
        if len(counts) != num_layers:
            raise UserError(
                f"experts.counts: {len(counts)} numbers, but the model has {num_layers} layers; give one per layer"
            )
        return Allocation(counts, None, f"explicit: {sum(counts) - num_layers} new experts")
    if experts.allocation == "keep":
        return Allocation([1] * num_layers, None, "keep: the base's experts, no new ones")
    if experts.allocation == "mola":
        counts = [MOLA[4 * layer // num_layers] for layer in range(num_layers)]
        return Allocation(counts, None, f"mola: {sum(counts) - num_layers} new experts")
    if experts.allocation == "uniform":
        shares = [1 / num_layers] * num_layers
    else:
        shares = inverse_shares(similarity or [])
        if len(shares) != num_layers:
            raise UserError(f"similarity: {len(shares)} layers, but the model has {num_layers}; measure it again")
    if experts.delta is not None:
        counts = ceil_counts(shares, experts.delta)
        return Allocation(counts, experts.delta, f"delta {experts.delta:g}: {sum(counts) - num_layers} new experts")
    total = num_layers + (experts.num_new or 0)
    if experts.rounding == "largest_remainder":
        counts = largest_remainder_counts(shares, total)
        return Allocation(counts, None, f"{total - num_layers} new experts, the budget exactly")
    delta = delta_for_total(shares, total)
    counts = ceil_counts(shares, delta)
    if experts.rounding == "expert_parallel":
        shared = evenly_shared_counts(counts, ep_size)
        return Allocation(shared, None, _deviation(counts, shared, total, ep_size))
    short = total - sum(counts)
    note = f"delta {delta:.6g}: {sum(counts) - num_layers} new experts, " + (
        "the budget exactly" if short == 0 else f"{short} below the budget, as close as rounding up comes"
    )
    return Allocation(counts, delta, note)


def inverse_shares(similarity: list[float]) -> list[float]:
    """Each layer's share of the experts, (1/S_l) / sum_k (1/S_k): the less similar the languages, the larger (3.2).

    Raises:
        UserError: names the first layer whose similarity is not positive.
    """
    for layer, value in enumerate(similarity):
        if not value > 0:
            raise UserError(
                f"similarity: layer {layer} has S = {value:.6g}, which is not positive, so 1/S has no meaning; "
                "use experts.allocation=uniform, or similarity.not_positive=clamp"
            )
    total = math.fsum(1 / value for value in similarity)
    return [1 / value / total for value in similarity]


def clamp_similarity(similarity: list[float]) -> tuple[list[float], list[int]]:
    """Raise values below ``SMALLEST_SIMILARITY`` to it; also returns the numbers of the layers that changed."""
    changed = [layer for layer, value in enumerate(similarity) if not value >= SMALLEST_SIMILARITY]
    return [value if value >= SMALLEST_SIMILARITY else SMALLEST_SIMILARITY for value in similarity], changed


def ceil_counts(shares: list[float], delta: float) -> list[int]:
    """N_l = ceil(share_l * delta), the paper's rounding."""
    return [math.ceil(share * delta) for share in shares]


def delta_for_total(shares: list[float], total: int) -> float:
    """The delta for which the counts of :func:`ceil_counts` sum to ``total``, or to as little below as possible.

    The sum of ceil(share * delta) grows in steps, at delta = k / share; the search tries these steps in order.

    Raises:
        UserError: even the smallest delta gives more than ``total``.
    """
    steps = sorted({k / share for share in shares for k in range(total + 1)})
    best = None
    for low, high in zip(steps, steps[1:], strict=False):
        delta = (low + high) / 2
        if sum(ceil_counts(shares, delta)) > total:
            break
        best = delta
    if best is None:
        raise UserError(
            f"experts.num_new: {total - len(shares)} is too few for rounding: ceil; use rounding: largest_remainder"
        )
    return best


def ep_size_to_share(run: RunConfig) -> int:
    """The ranks that are to share a layer's new experts evenly; 1 where it is not known yet."""
    return 1 if run.parallel.ep_size == "auto" else run.parallel.ep_size


def evenly_shared_counts(counts: list[int], ep_size: int) -> list[int]:
    """The nearest counts, the larger of two, whose new experts the ranks of an expert-parallel group share evenly.

    These are multiples of ``ep_size``, or divisors of it: then each expert is on as many ranks as any other.
    """

    def nearest(num_new: int) -> int:
        candidates = [n for n in range(1, num_new + ep_size + 1) if n % ep_size == 0 or ep_size % n == 0]
        return min(candidates, key=lambda n: (abs(n - num_new), -n)) if num_new else 0

    return [1 + nearest(count - 1) for count in counts]


def _deviation(paper: list[int], counts: list[int], total: int, ep_size: int) -> str:
    """How far counts are from the paper's, for the user."""
    moved = [
        f"{layer}: {before - 1} -> {after - 1}"
        for layer, (before, after) in enumerate(zip(paper, counts, strict=True))
        if before != after
    ]
    where = f"; new experts by layer, other than the paper's rounding gives: {', '.join(moved)}" if moved else ""
    difference = sum(counts) - total
    return (
        f"{sum(counts) - len(counts)} new experts that ep_size {ep_size} shares evenly, {difference:+d} against the "
        f"budget{where}"
    )


def largest_remainder_counts(shares: list[float], total: int) -> list[int]:
    """Counts of at least 1 that sum to ``total``: each share rounded down, the rest to the largest remainders.

    A layer whose share is below 1 gets 1; the others then divide what is left.
    """
    counts = [0] * len(shares)
    free = list(range(len(shares)))
    while True:
        rest = total - (len(shares) - len(free))
        weight = math.fsum(shares[layer] for layer in free)
        quotas = {layer: shares[layer] / weight * rest for layer in free}
        below = [layer for layer in free if quotas[layer] < 1]
        if not below:
            break
        for layer in below:
            counts[layer] = 1
        free = [layer for layer in free if layer not in below]
    for layer in free:
        counts[layer] = math.floor(quotas[layer])
    missing = total - sum(counts)
    by_remainder = sorted(free, key=lambda layer: (-(quotas[layer] - math.floor(quotas[layer])), layer))
    for layer in by_remainder[:missing]:
        counts[layer] += 1
    return counts


def most_similar_layers(similarity: list[float], counts: list[int], how_many: int) -> list[int]:
    """The ``how_many`` layers with a router that have the highest similarity: they get a classifier (section 3.3).

    Raises:
        UserError: fewer layers have a router.
    """
    routed = [layer for layer, count in enumerate(counts) if count > 1]
    if how_many > len(routed):
        raise UserError(
            f"experts.classifier_layers: {how_many} layers, but only {len(routed)} have a router; give at most that"
        )
    return sorted(sorted(routed, key=lambda layer: (-similarity[layer], layer))[:how_many])


def classifier_layers(experts: ExpertsConfig, counts: list[int], similarity: list[float] | None) -> list[int]:
    """The layers that get a routing classifier (section 3.3): those listed, or the most similar ones.

    Args:
        experts: the run's section.
        counts: experts per layer.
        similarity: S_l per layer, where it was measured.

    Raises:
        UserError: a number of layers is asked for, and there are no similarities or too few routers.
    """
    wanted = experts.classifier_layers
    if isinstance(wanted, list):
        return wanted
    if wanted == 0:
        return []
    if similarity is None:
        raise UserError("experts.classifier_layers: a number needs similarities, and so an old set; give a list")
    return most_similar_layers(similarity, counts, wanted)


def dense_plan(run: RunConfig, num_layers: int) -> ExpertPlan:
    """The plan of a run whose model stays dense.

    Args:
        run: its settings.
        num_layers: of the dense model.
    """
    old = sorted({entry.language for entry in run.data.old.values()})
    return ExpertPlan.dense(num_layers, old=old, new=sorted({entry.language for entry in run.data.new.values()}))


def _kept_plan(run: RunConfig, plan: ExpertPlan) -> ExpertPlan:
    """The base's plan, for a run that reviews its model; checked that the run's languages fit it."""
    learned = plan.rounds[-1].languages
    for entry in run.data.new.values():
        if entry.language not in learned:
            raise UserError(
                f"data.new: {entry.language} is not one of those that the base learned last, {', '.join(learned)}, "
                "which experts.allocation keep reviews; leave it out, or name it under old"
            )
    for entry in run.data.old.values():
        if entry.language in learned:
            raise UserError(
                f"data.old: {entry.language} is one of those that the base learned last; name it under new"
            )
    return plan


def expert_plan(run: RunConfig, counts: list[int], similarity: list[float] | None) -> ExpertPlan:
    """The plan of a run: of a dense model's first expansion, of a further one, or the base's where it is kept.

    Args:
        run: its settings.
        counts: N_l of each layer as allocated; a further expansion adds N_l - 1 (section 4).
        similarity: S_l per layer, where it was measured.

    Raises:
        UserError: top_k is not the expanded model's, classifier layers do not fit, or languages do not.
    """
    new = sorted({entry.language for entry in run.data.new.values()})
    before = None if run.base is None else ExpertPlan.load(run.base.run / PLAN_FILE)
    if before is None:
        old = sorted({entry.language for entry in run.data.old.values()})
        layers = classifier_layers(run.experts, counts, similarity)
        return ExpertPlan.first_expansion(
            counts, old=old, new=new, top_k=run.experts.top_k, classifier_layers=layers, similarity=similarity,
            classifier=run.experts.classifier,
        )  # fmt: skip
    if run.experts.allocation == "keep":
        return _kept_plan(run, before)
    if run.experts.top_k != before.top_k:
        raise UserError(f"experts.top_k: {run.experts.top_k}, but the expanded model has {before.top_k}; give that")
    if before.classifier_layers and run.experts.classifier != before.classifier:
        raise UserError(
            f"experts.classifier: {run.experts.classifier}, but the base run's classify each {before.classifier}; "
            "give that"
        )
    known = {language for one in before.rounds for language in one.languages}
    for language in new:
        if language in known:
            raise UserError(
                f"data.new: {language} was added by the base run or is one of its old languages; leave it out"
            )
    num_new = [count - 1 for count in counts]
    total = [count + num for count, num in zip(before.counts, num_new, strict=True)]
    layers = classifier_layers(run.experts, total, similarity)
    return before.expand(
        num_new, languages=new, classifier_layers=layers, similarity=similarity, classifier=run.experts.classifier,
        source="most used expert" if run.experts.copy_of == "most_used" else "expert 0",
    )  # fmt: skip

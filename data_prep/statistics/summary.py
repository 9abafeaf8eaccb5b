"""What is printed of finished sets: a line per set, what was lost, and warnings."""

from data_prep.make_plan import Planned
from data_prep.plan import Budget, SetPlan
from data_prep.store import SetStatistics, TokenStore

TOLERANCE = 0.1  # whole documents are taken, so that a cap of tokens is not met exactly


def print_summary(store: TokenStore) -> None:
    """Print one line per set, then what needs attention."""
    statistics = store.statistics
    for name, entry in statistics.sets.items():
        print(_line(name, entry), flush=True)
    for name, entry in statistics.sets.items():
        if entry.bad_rows.rows:
            examples = "; ".join(entry.bad_rows.examples[:3])
            print(f"warning: set {name}: {entry.bad_rows.rows:,} bad rows skipped: {examples}", flush=True)
        if entry.warning:
            print(f"warning: {entry.warning}", flush=True)


def print_short_caps(planned: Planned, store: TokenStore) -> None:
    """One warning for each training set that has less than its caps ask for, though not all of its text was read."""
    for one in planned.sets:
        slices = len(planned.corpora.get(one.name, one.slices))
        train = store.statistics.sets[one.name].train if one.trains else None
        if train is None or len(one.slices) == slices:
            continue
        limits, has = (
            _caps_of(one).limits,
            {unit: getattr(train, unit) for unit in ("documents", "tokens", "characters")},
        )
        if limits and all(has[unit] < limit * (1 - TOLERANCE) for unit, limit in limits.items()):
            wanted = " and ".join(f"max_{unit}={limit:,}" for unit, limit in limits.items())
            given = " and ".join(f"{has[unit]:,} {unit}" for unit in limits)
            print(
                f"warning: set {one.name}: {wanted} asked, but the {len(one.slices):,} of {slices:,} slices that were "
                f"read gave {given}: more of them was filtered than of the text's beginning; a higher cap reads more",
                flush=True,
            )


def _caps_of(one: SetPlan) -> Budget:
    """The most that a set's caps let it have: its own, or those of all its sources together."""
    caps = [Budget(*source.caps).limits for source in one.entry.source_list]
    together = {unit: sum(cap[unit] for cap in caps) for unit in caps[0] if all(unit in cap for cap in caps)}
    return Budget(**together).within(Budget(*one.entry.caps))


def _line(name: str, entry: SetStatistics) -> str:
    part = entry.train or entry.held_out
    before = "" if part.fertility_before is None else f" (before: {part.fertility_before:.2f})"
    parts = [entry.held_out] if entry.train is None else [entry.train, entry.held_out]
    documents = sum(p.documents for p in parts)
    characters, tokens = sum(p.characters for p in parts), sum(p.tokens for p in parts)
    dropped = ", ".join(f"{lost.documents:,} {reason}" for reason, lost in entry.dropped.items()) or "none"
    return (
        f"{entry.group.upper():5} {name:12} {documents:>11,} documents {characters:>15,} characters "
        f"{tokens:>14,} tokens {part.characters_per_token or 0:5.2f} characters/token "
        f"{part.fertility or 0:5.2f} tokens/word{before} | "
        f"held out {entry.held_out.documents:,}, dropped: {dropped}"
    )

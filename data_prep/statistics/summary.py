"""What is printed of finished sets: a line per set, what was lost, and warnings."""

from data_prep.store import SetStatistics, TokenStore


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


def _line(name: str, entry: SetStatistics) -> str:
    part = entry.train or entry.held_out
    parts = [entry.held_out] if entry.train is None else [entry.train, entry.held_out]
    documents = sum(p.documents for p in parts)
    characters, tokens = sum(p.characters for p in parts), sum(p.tokens for p in parts)
    dropped = ", ".join(f"{lost.documents:,} {reason}" for reason, lost in entry.dropped.items()) or "none"
    return (
        f"{entry.group.upper():5} {name:12} {documents:>11,} documents {characters:>15,} characters "
        f"{tokens:>14,} tokens {part.characters_per_token or 0:5.2f} characters/token "
        f"{part.fertility or 0:5.2f} tokens/word | "
        f"held out {entry.held_out.documents:,}, dropped: {dropped}"
    )

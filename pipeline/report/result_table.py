"""The result as a table of text."""

from pipeline.records.evaluation import GROUPS, Evaluation, SetResult


def result_table(evaluation: Evaluation) -> str:
    """Bits per character by set and checkpoint, and the last checkpoint's change against the base model."""
    labels = evaluation.checkpoints
    last = labels[-1]
    lines = [
        "bits/char, lower is better; +- is a paired 95 % interval over documents",
        f"{'':6}{'':12}{'chars':>9}  " + "".join(f"{label:>9}" for label in labels) + f"{'change':>11}",
    ]
    forgotten = evaluation.forgotten(last)
    for group in GROUPS:
        for name, entry in evaluation.sets.items():
            if entry.group == group:
                lines.append(_row(name, entry, labels, last) + ("  FORGOTTEN" if name in forgotten else ""))
    if forgotten:
        lines.append("FORGOTTEN: a language that the model knew takes more bits than before, beyond the interval")
    return "\n".join(lines)


def _row(name: str, entry: SetResult, labels: list[str], last: str) -> str:
    values = "".join(f"{entry.bits_per_character[label]:9.3f}" for label in labels)
    row = f"{entry.group.upper():6}{name:12}{entry.characters:9,}  {values}"
    change = entry.change.get(last)
    if change is None:
        return row
    interval = "" if change.interval is None else f" +-{change.interval:.1f}"
    return f"{row}{change.percent:+9.1f} %{interval}"


def figures_line(parameters: dict[str, int], tokens_per_second: float, peak_memory_gb: float, minutes: float) -> str:
    """What it took, in a line.

    Args:
        parameters: numbers of parameters: dense, total, active.
        tokens_per_second: of stage 1, all ranks.
        peak_memory_gb: of all ranks together, in 10^9 bytes.
        minutes: of all steps.
    """
    return (
        f"parameters {parameters['dense'] / 1e6:.1f} M -> {parameters['total'] / 1e6:.1f} M "
        f"(active {parameters['active'] / 1e6:.1f} M)   stage 1 {tokens_per_second:,.0f} tokens/s   "
        f"peak memory {peak_memory_gb:.1f} GB   {minutes:.1f} min"
    )

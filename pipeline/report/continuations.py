"""Continuations of prompts as text: what the base model and the last checkpoint go on with, one under the other."""

from common.errors import one_line
from pipeline.records.evaluation import Evaluation


def continuations_text(evaluation: Evaluation) -> str:
    """For each prompt a heading, and a line per model."""
    lines = ["how they go on, token by token the likeliest"]
    for one in evaluation.continuations:
        width = max(len(label) for label in one.texts)
        lines.append(f"{one.name}: {one_line(one.prompt, None)}")
        lines += [f"  {label:{width}}  … {one_line(text, None)}" for label, text in one.texts.items()]
    return "\n".join(lines)

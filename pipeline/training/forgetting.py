"""Whether the languages that the model knew have become worse than they were in the base model."""

import numpy as np

from data_prep.config import DataConfig
from pipeline.evaluation.evaluate import paired_change
from pipeline.records.evaluation import SetScore


def sets_of_old_languages(data: DataConfig) -> list[str]:
    """The old sets, and those to watch that are in one of their languages."""
    languages = {entry.language for entry in data.old.values()}
    return [name for name in (*data.old, *data.watch) if data.sets[name].language in languages]


def forgotten(base: dict[str, SetScore], scores: dict[str, SetScore]) -> dict[str, float]:
    """By set, by how many percent it takes more bits than the base model, beyond its 95 % interval over documents.

    Args:
        base: the base model's scores of the sets of old languages.
        scores: those of now.
    """
    found = {}
    for name, before in base.items():
        change = paired_change(np.array(before.bits), np.array(scores[name].bits))
        if change.is_worse:
            found[name] = round(change.percent, 3)
    return found

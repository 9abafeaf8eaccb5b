"""Pairs of sentences of FLORES+; lm-eval imports this from the folder of the task's file."""

from typing import Any

DATASET = "openlanguagedata/flores_plus"
SPLITS = ("dev", "devtest")


def load(source: str, target: str, **_others: Any) -> dict[str, Any]:
    """The sentences of two languages side by side.

    Args:
        source: the language to translate from, as the dataset names it: eng_Latn.
        target: the one to translate into.
    """
    from datasets import load_dataset

    first, second = load_dataset(DATASET, source), load_dataset(DATASET, target)
    return {split: pairs(first[split], second[split]) for split in SPLITS}


def pairs(source: Any, target: Any) -> Any:
    """Sentences with the same id, in the order of ids."""
    from datasets import Dataset

    texts = {row["id"]: row["text"] for row in target}
    rows = [
        {"source_text": row["text"], "target_text": texts[row["id"]]}
        for row in sorted(source, key=lambda row: row["id"])
        if row["id"] in texts
    ]
    return Dataset.from_list(rows)

"""What the tasks of held-out sets need beside their YAML; lm-eval imports it from the folder of the task's file."""

import json
from pathlib import Path
from typing import Any


def load(file: str, **_others: Any) -> dict[str, Any]:
    """The documents of a set, from a JSON-lines file beside this one."""
    from datasets import Dataset

    with open(Path(__file__).with_name(file), encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """A document's log-likelihood beside its UTF-8 bytes, and beside its Unicode characters."""
    (log_likelihood,) = results
    return {
        "bits_per_byte": (log_likelihood, doc["bytes"]),
        "bits_per_character": (log_likelihood, doc["characters"]),
    }

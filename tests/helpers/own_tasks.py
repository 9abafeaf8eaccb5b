"""A user's own folder of lm-eval tasks, of each kind, about the words of the tiny runs."""

from pathlib import Path

import yaml

from tests.helpers.tiny import WORDS

CHOICES, SPELLED, ONE = "own_choices", "own_continuation", "own_single"
GROUP = "own_group"
CODE = f"""
from datasets import Dataset

WORDS = {WORDS["el"].split()!r}


def choices(**_others):
    rows = [{{"question": WORDS[i], "choices": WORDS[i:i + 4], "answer": i % 4}} for i in range(5)]
    return {{"test": Dataset.from_list(rows), "train": Dataset.from_list(rows[::-1])}}


def single(**_others):
    return {{"test": Dataset.from_list([{{"question": WORDS[0], "choices": WORDS[:3], "answer": 1}}])}}


def continuation(**_others):
    rows = [{{"text": " ".join(WORDS[:i + 2]), "next": WORDS[i + 2]}} for i in range(3)]
    return {{"test": Dataset.from_list(rows)}}
"""


def write_own_tasks(folder: Path) -> Path:
    """Write them; the folder.

    ``own_choices`` asks five questions after examples, ``own_single`` only one; both are in ``own_group``, which has
    figures of its own. ``own_continuation`` wants text.
    """
    folder.mkdir(parents=True)
    (folder / "words.py").write_text(CODE, encoding="utf-8")
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    asked = {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "question",
             "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [accuracy]}  # fmt: skip
    matches = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    similar = {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}
    spelled = {"output_type": "generate_until", "test_split": "test", "doc_to_text": "text", "doc_to_target": "next",
               "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
               "metric_list": [matches, similar]}  # fmt: skip
    _write(folder, CHOICES, "choices", {**asked, "fewshot_split": "train", "num_fewshot": 1})
    _write(folder, ONE, "single", asked)
    _write(folder, SPELLED, "continuation", spelled)
    group = {"group": GROUP, "task": [CHOICES, ONE], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


def _write(folder: Path, name: str, function: str, settings: dict[str, object]) -> None:
    text = yaml.safe_dump({"task": name, **settings, "metadata": {"version": 2}}, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(f"custom_dataset: !function words.{function}\n{text}", encoding="utf-8")

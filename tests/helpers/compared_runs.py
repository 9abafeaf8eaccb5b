"""Folders of finished runs with made-up scores of documents, for the tests of comparisons."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import LlamaConfig

from pipeline.evaluation.evaluate import paired_change
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import Evaluation, Group, SetResult
from pipeline.records.run_folder import RunFolder
from pipeline.records.step_manifest import StepInputs

BASE = {"en": 0.9, "el": 2.7, "tr": 2.4, "en-udhr": 1.0}  # bits per character of the dense model
GROUPS: dict[str, Group] = {"en": "old", "el": "new", "tr": "new", "en-udhr": "watch"}
DOCUMENTS, CHARACTERS = 20, 1000  # of each set; of each document
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """A run's keys; dotted ones are changed."""
    tree: dict[str, Any] = {
        "name": name,
        "model": {"path": "models/dense"},
        "data": {
            "old": {"en": {"path": "en.jsonl"}},
            "new": {"el": {"path": "el.jsonl"}, "tr": {"path": "tr.jsonl"}},
            "watch": {"en-udhr": {"path": "udhr.jsonl", "language": "en"}},
        },
        "experts": {"allocation": "explicit", "counts": [3, 2, 1, 4]},
        "stage1": {"tokens": 4096, "sequence_length": 32, "global_batch_size": 8},
        "stage2": {"tokens": 1024, "sequence_length": 32, "global_batch_size": 8},
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = tree
        for part in parents:
            section = section[part]
        section[last] = value
    return tree


def save_run(
    root: Path, name: str, percents: dict[str, float], *, texts: str = "a", window: int = 1024, **changes: Any
) -> Path:
    """A finished run whose last stage changes each set's bits by so many percent, documents by some more or less.

    Args:
        root: the folder of runs.
        name: the run's.
        percents: by set.
        texts: another one stands for other held-out documents.
        window: that it was scored in.
        changes: of its settings, by dotted key.
    """
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True)
    folder.run_file.write_text(yaml.safe_dump(settings(name, **changes)), encoding="utf-8")
    ExpertPlan.first_expansion([3, 2, 1, 4], old=["en"], new=["el", "tr"], top_k=2, classifier_layers=[]).save(
        folder / "expert_plan.json"
    )
    CONFIG.save_pretrained(folder / "upcycled" / "hf")
    for stage, tokens in (("stage1", 4096), ("stage2", 1024)):
        figures = {"tokens": tokens, "training_seconds": tokens / 64, "seconds": 1.0}
        folder.finish(stage, StepInputs(inputs={}, run={}), {}, figures)
    scored = {"sets": {name: f"{texts}-{name}" for name in percents}, "window": window}
    folder.finish("evaluate", StepInputs(inputs=scored, run={}), {}, {})
    evaluation(percents, seed=name).save(folder / "evaluation.json")
    return folder.path


def evaluation(percents: dict[str, float], seed: str) -> Evaluation:
    """Scores of the dense model, which are always the same, and of two stages."""
    return Evaluation(
        window=1024,
        checkpoints=["base", "stage1", "stage2"],
        sets={name: result(name, percent, seed) for name, percent in percents.items()},
        routing={},
        parameters={
            "dense": 100_000_000, "total": 200_000_000, "active": 150_000_000, "stage1_trained": 100_000_000,
            "stage2_trained": 50_000,
        },
    )  # fmt: skip


def result(name: str, percent: float, seed: str) -> SetResult:
    """One set: in all of its documents together, the last stage changes the bits by ``percent``, stage 1 by 1 more."""
    lengths = np.linspace(0.5, 1.5, DOCUMENTS)
    base = BASE[name] * CHARACTERS * lengths
    wave = np.sin(np.arange(DOCUMENTS) + len(seed) + sum(map(ord, seed)))
    wave -= (wave * base).sum() / base.sum()
    bits = {
        "base": base,
        "stage1": base * (1 + (percent + 1 + wave) / 100),
        "stage2": base * (1 + (percent + wave) / 100),
    }
    return SetResult(
        group=GROUPS[name],
        language=name[:2],
        documents=DOCUMENTS,
        characters=DOCUMENTS * CHARACTERS,
        bits_per_character={stage: float(found.sum()) / DOCUMENTS / CHARACTERS for stage, found in bits.items()},
        change={stage: paired_change(base, bits[stage]) for stage in ("stage1", "stage2")},
        bits_by_document={stage: found.tolist() for stage, found in bits.items()},
        pages=[f"page-{number}" for number in range(DOCUMENTS)],
    )

"""A run folder with realistic numbers, for the report's tests."""

import json
import math
import random
from pathlib import Path
from typing import Any

from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.step_manifest import FORMAT

COUNTS = [3, 4, 4, 5, 5, 5, 5, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 3, 2, 2]
CLASSIFIERS = [12, 14, 16, 17, 18, 28, 29]
BITS = {
    "el": ("new", "el", 2.743, 1.526, 1.539),
    "hu": ("new", "hu", 2.908, 1.861, 1.872),
    "tr": ("new", "tr", 2.418, 1.771, 1.780),
    "en": ("old", "en", 0.887, 0.857, 0.856),
    "en-udhr": ("watch", "en", 1.031, 1.044, 1.029),
    "el-udhr": ("watch", "el", 3.280, 2.890, 2.901),
}
RUN_YAML = """\
name: quickstart
seed: 17
model: {path: inputs/smollm2-135m}
data:
  old: {en: {path: inputs/help/en.jsonl}}
  new: {el: {path: inputs/help/el.jsonl}, hu: {path: inputs/help/hu.jsonl}, tr: {path: inputs/help/tr.jsonl}}
  watch: {en-udhr: {path: inputs/udhr/en.jsonl, language: en}, el-udhr: {path: inputs/udhr/el.jsonl, language: el}}
experts: {allocation: layerwise, num_new: 60, classifier_layers: 7}
stage1: {tokens: 150_000, sequence_length: 256, global_batch_size: 8, lr: 5.0e-4}
stage2: {tokens: 40_000, sequence_length: 256, global_batch_size: 2, lr: 1.0e-3}
"""


def make_run(folder: Path) -> Path:
    """Write every file that a finished run leaves for its report."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(RUN_YAML)
    plan = ExpertPlan.first_expansion(
        COUNTS, old=["en"], new=["el", "hu", "tr"], top_k=2, classifier_layers=CLASSIFIERS
    )
    plan.save(folder / "expert_plan.json")
    write(folder / "similarity.json", similarity())
    write(folder / "evaluation.json", evaluation())
    make_stage(folder / "stage1", steps=73, tokens=2048, losses=("next_token", "balance"))
    make_stage(folder / "stage2", steps=78, tokens=512, losses=("next_token", "lpr", "classifier"))
    for step, seconds in {
        "tokenize": 41.2,
        "similarity": 63.0,
        "allocate": 0.1,
        "stage1": 401.5,
        "stage2": 122.8,
    }.items():
        figures: dict[str, Any] = {"seconds": seconds, "tokens_per_second": 423.4, "peak_memory_gb": 3.31}
        if step == "allocate":
            figures = {"note": "61 new experts, one over the budget"}
        versions = {"torch": "2.13.0", "deepspeed": "0.19.8"}
        write(
            folder / "manifests" / f"{step}.json",
            {
                "format": FORMAT,
                "step": step,
                "done_with": {"inputs": {}, "run": {}},
                "outputs": {},
                "figures": figures,
                "versions": versions,
            },
        )
    return folder


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def similarity() -> dict[str, Any]:
    """S from 0.12 to 0.6: low in layers 1 to 7 and 24 to 26, high between."""
    by_layer = [0.36 - 0.24 * math.cos((layer - 3) / 26 * 2 * math.pi) for layer in range(30)]
    pairs = {}
    for number, pair in enumerate(("el&hu", "el&tr", "hu&tr", "el&en", "hu&en", "tr&en")):
        pairs[pair] = [value + 0.03 * (2.5 - number) / 2.5 + 0.01 * math.sin(number + 5 * value) for value in by_layer]
    pairs |= {"el&el": [0.7] * 30, "en&en": [0.8] * 30}
    return {
        "old": ["en"],
        "new": ["el", "hu", "tr"],
        "tokens": dict.fromkeys(["en", "el", "hu", "tr"], 20000),
        "pairs": pairs,
        "by_layer": by_layer,
    }


def evaluation() -> dict[str, Any]:
    """Scores of three checkpoints, and routing in which old languages move to expert 0 in stage 2."""
    sets = {}
    for name, (group, language, *bits) in BITS.items():
        interval = None if "udhr" in name else 1.1
        sets[name] = {
            "group": group,
            "language": language,
            "documents": 1 if interval is None else 60,
            "characters": 70123,
            "bits_by_document": {},
            "pages": [],
            "bits_per_character": dict(zip(("base", "stage1", "stage2"), bits, strict=True)),
            "change": {
                stage: {"percent": 100 * (after / bits[0] - 1), "interval": interval}
                for stage, after in zip(("stage1", "stage2"), bits[1:], strict=True)
            },
        }
    return {
        "window": 1024,
        "checkpoints": ["base", "stage1", "stage2"],
        "sets": sets,
        "routing": {"stage1": routing(0.0), "stage2": routing(0.35)},
        "parameters": {
            "dense": 134515008,
            "total": 293824512,
            "active": 214230528,
            "stage1_trained": 159000000,
            "stage2_trained": 86400,
        },
    }


def routing(pull: float) -> dict[str, Any]:
    """``pull`` moves old-language tokens to expert 0."""
    draw = random.Random(3)
    sets = {}
    for name, (_, language, *_rest) in BITS.items():
        old = pull if language == "en" else -0.1 * pull
        sets[name] = {
            "expert_0_share": [1.0 if n == 2 else min(0.99, 2 / n + old + draw.uniform(-0.1, 0.1)) for n in COUNTS],
            "probability_0": [min(0.98, 1 / n + 0.8 * old + draw.uniform(-0.06, 0.06)) for n in COUNTS],
            "classified_old": [
                0.0 if layer not in CLASSIFIERS or not pull else 0.98 if old > 0 else 0.012 for layer in range(30)
            ],
        }
    return {"layers": list(range(30)), "sets": sets}


def make_stage(folder: Path, *, steps: int, tokens: int, losses: tuple[str, ...]) -> None:
    """Rows of training and validation that fall as real ones do."""
    draw = random.Random(1)
    rows = [_metrics_row(step, steps, tokens, losses, draw) for step in range(1, steps + 1)]
    checks = [
        _validation_row(step, steps, tokens, "balance" in losses)
        for step in range(1, steps + 1)
        if step % (steps // 6) == 0
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    write(folder / "best.json", {"tag": f"step{checks[-2]['step']:06d}", "bits_per_character": checks[-2]["mean"]})


def _metrics_row(step: int, steps: int, tokens: int, losses: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    done, is_first = step / steps, "balance" in losses
    values = {
        "next_token": 1.6 + (2.2 * math.exp(-4 * done) if is_first else 0.1) + draw.gauss(0, 0.08),
        "balance": 1.04 + 0.08 * math.exp(-8 * done) + draw.gauss(0, 0.004),
        "lpr": 0.4 + 0.7 * math.exp(-3 * done) + draw.gauss(0, 0.03),
        "classifier": 0.69 * math.exp(-6 * done) + abs(draw.gauss(0, 0.01)),
    }
    shares = {"el": 0.72, "hu": 0.71, "tr": 0.7} | ({} if is_first else {"en": 0.74 + 0.2 * done})
    return {
        "step": step,
        "samples": step * tokens // 256,
        "tokens": step * tokens,
        "loss": {kind: value if kind in losses else 0.0 for kind, value in values.items()},
        "expert_0_share": {name: value + draw.gauss(0, 0.01) for name, value in shares.items()},
        "load_imbalance": [1.05 + 0.12 * n * math.exp(-3 * done) + draw.uniform(0, 0.1) for n in COUNTS],
        "lr": 5e-4 * min(1.0, step / 4) * (0.55 + 0.45 * math.cos(math.pi * done)),
        "grad_norm": 0.8 + 1.5 * math.exp(-5 * done) + abs(draw.gauss(0, 0.15)),
        "tokens_per_second": 420 + draw.gauss(0, 12),
        "memory_gb": 3.3,
        "skipped": None,
        "seconds": 4.8,
    }


def _validation_row(step: int, steps: int, tokens: int, is_first: bool) -> dict[str, Any]:
    done = step / steps
    sets = {
        name: (b1 + (b0 - b1) * math.exp(-3.5 * done) if is_first else b1 + (b2 - b1) * done)
        for name, (_, _, b0, b1, b2) in BITS.items()
        if "udhr" not in name
    }
    mean = sum(sets.values()) / len(sets)
    return {
        "step": step,
        "samples": 1,
        "tokens": step * tokens,
        "sets": sets,
        "mean": mean,
        "best": step % 12 == 0,
    }

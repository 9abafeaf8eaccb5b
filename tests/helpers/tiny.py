"""Tiny real things for tests: models of each family, a tokenizer, corpora, and runs prepared up to upcycling."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from common.settings import parse_settings
from pipeline.checkpoint.store import read_manifest, write_manifest
from pipeline.checkpoint.tensors import load_tensors, save_tensors
from pipeline.config.run import RunConfig
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from pipeline.run.runner import do_step
from pipeline.run.steps import step_named

VOCAB_SIZE = 300
HIDDEN, FFN = 32, 48
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
WORDS = {
    "en": "house river stone bread water light green morning",
    "el": "σπίτι ποτάμι πέτρα ψωμί νερό φως πράσινο πρωί",
    "hu": "ház folyó kő kenyér víz fény zöld reggel",
    "tr": "ev nehir taş ekmek su ışık yeşil sabah",
}


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of at most 300 ids, with ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(WORDS.values()) * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", num_layers: int = 4, **options: Any) -> Path:
    """A random model of a family, with its tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = FAMILIES[family](**sizes | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15 if parameter.ndim > 1 else 0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_corpus(folder: Path, languages: list[str], pages: int = 60) -> dict[str, Path]:
    """Made-up pages with the same names in each language, as .jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for language in languages:
        words = WORDS[language].split()
        generator = torch.Generator().manual_seed(len(language) + sum(map(ord, language)))
        rows = []
        for page in range(pages):
            picks = torch.randint(len(words), (30,), generator=generator).tolist()
            text = " ".join(f"{words[pick]}{(page * 7 + pick * 3) % 97}" for pick in picks)
            rows.append({"text": text, "page": f"page-{page}"})
        paths[language] = folder / f"{language}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[language].write_text("".join(lines), encoding="utf-8")
    return paths


def parse_run(tree: dict[str, Any], name: str) -> RunConfig:
    """Check a run's settings, given as nested dictionaries; ``name`` stands in errors for their file."""
    return parse_settings(RunConfig, tree, name)


def run_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a tiny run with unequal new experts a layer: 2, 1, 0 and 3."""
    if not (folder / "model").is_dir():
        save_model(folder / "model")
    corpus = save_corpus(folder / "text", ["en", "el", "hu"])
    tree: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        "model": {"path": str(folder / "model")},
        "data": {
            "held_out": {"by": "page", "fraction": 0.1},
            "replay": None,  # all of the old sets
            "old": {"en": {"path": str(corpus["en"])}},
            "new": {"el": {"path": str(corpus["el"])}, "hu": {"path": str(corpus["hu"]), "weight": 0.5}},
        },
        "similarity": {"tokens": 500, "sequence_length": 32},
        "experts": {"allocation": "explicit", "counts": [3, 2, 1, 4], "classifier_layers": [0, 3]},
        "stage1": {"tokens": 1536, "sequence_length": 32, "global_batch_size": 8, "lr": 1e-2, "warmup_ratio": 0.2},
        "stage2": {
            "tokens": 1536, "sequence_length": 32, "global_batch_size": 8, "lr": 1e-2, "warmup_ratio": 0.2,
            "old_share": 0.3,
        },
        "checkpoint": {"every_minutes": None},
        "deepspeed": "ds_configs/fp32_zero1.json",
        "log": {"tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) and isinstance(value, dict) else value
    return tree


def write_run(folder: Path, *, prepared: bool = False, **changes: Any) -> Path:
    """A tiny run's YAML, with all steps still to do, or done up to upcycling."""
    folder.mkdir(parents=True, exist_ok=True)
    if prepared:
        prepared_run(folder, distinct_experts=False, **changes)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(folder, **changes)), encoding="utf-8")
    return path


def do_steps(context: RunContext, *names: str) -> RunContext:
    """Do the steps of these names that are not done, in this process; returns the context."""
    for name in names:
        step = step_named(name)
        if not step.is_done(context):
            do_step(context, step)
    return context


def prepared_run(folder: Path, *, distinct_experts: bool = True, **changes: Any) -> RunConfig:
    """A tiny run, done up to upcycling. Its new experts are made distinct, as after training."""
    run = parse_run(run_tree(folder, **changes), "tiny.yaml")
    RunFolder.create(run)
    written = run.experts.model_copy(update={"write_copies": distinct_experts or run.experts.write_copies})
    context = RunContext(run.model_copy(update={"experts": written}))
    do_steps(context, "tokenize", "similarity", "allocate", "upcycle")
    if distinct_experts:
        generator = torch.Generator().manual_seed(3)
        manifest = read_manifest(context.upcycled, UpcycledManifest)
        files = dict(manifest.files)
        for file in sorted((context.upcycled / "upcycled").glob("layer_*_expert_*.pt")):
            state = load_tensors(file)
            noisy = {
                k: v.clone() + 0.2 * torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in state.items()
            }
            files[f"upcycled/{file.name}"] = save_tensors(noisy, file)
        write_manifest(context.upcycled, manifest.model_copy(update={"files": files}))
    return run

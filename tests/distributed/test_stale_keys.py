"""Which steps each key of a run makes stale, for every key. Run: pytest tests/distributed/test_stale_keys.py"""

import copy
import json
import shutil
import typing
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from data_prep.extend.extend import extend_tokenizer
from pipeline.config.run import RunConfig
from pipeline.run.changes import differences, explain
from pipeline.run.context import RunContext
from pipeline.run.steps import STEPS, step_named
from tests.distributed.conftest import Pools
from tests.distributed.test_staleness import run
from tests.helpers.tiny import do_steps, parse_run, run_tree, save_corpus, save_model

Tree = dict[str, Any]
T, S, A, U, S1, S2, E = "tokenize", "similarity", "allocate", "upcycle", "stage1", "stage2", "evaluate"


class Flip(NamedTuple):
    """A key, a change of it (of ``changed`` where the key is a pattern), and the steps whose inputs it changes.

    A step is also stale where one before it gives another result: that is not counted here.
    """

    key: str
    value: Any
    stale: set[str]
    changed: str = ""
    also: Tree = {}


OLD, NEW, WATCH = {T, S, S2, E}, {T, S, S1, S2, E}, {T, E}  # whose steps read the text of such a set
TRAINING_TEXT = OLD | NEW
TRAINING_PART = TRAINING_TEXT - {E}  # what is held out of it stays the same
FLIPS = [
    Flip("name", "other", set()),
    Flip("output_dir", "elsewhere", set()),
    Flip("cache_dir", "elsewhere", set()),
    Flip("seed", 18, {*TRAINING_TEXT, U}),
    Flip("model.path", "model2", {*TRAINING_TEXT, A, U}),
    Flip("model.revision", "main", set()),  # of a folder; a hub's model is another folder
    Flip("model.tokenizer", "extended", {T, U, S1, S2}),  # similarity is measured, the dense model scored, by its own
    # Text.
    Flip("data.*.path", "more/en.jsonl", OLD, "data.old.en.path"),
    Flip("data.*.path", "more/hu.jsonl", NEW, "data.new.hu.path"),
    Flip("data.*.path", "more/tr.jsonl", WATCH, "data.watch.tr.path"),
    Flip("data.*.path", "more/el.jsonl", {T}, "data.benchmarks.quiz.path"),
    Flip("data.*.hub", "hub2", WATCH, "data.watch.hub.hub"),
    Flip("data.*.config", "b", WATCH, "data.watch.hub.config"),
    Flip("data.*.split", "test", WATCH, "data.watch.hub.split"),
    Flip("data.*.revision", "main", set(), "data.watch.hub.revision"),  # of a folder, which has none
    Flip("data.*.data_files", ["b-train.jsonl"], WATCH, "data.watch.hub.data_files"),
    Flip("data.*.text_field", "page", NEW, "data.new.hu.text_field"),
    Flip("data.*.text_unit", "line", WATCH, "data.watch.lines.text_unit"),
    Flip("data.*.held_out_fraction", 0.3, NEW, "data.new.hu.held_out_fraction"),
    Flip("data.*.license", "mit", set(), "data.new.hu.license"),
    Flip("data.*.sources", [{"path": "more/el.jsonl"}], NEW, "data.new.el.sources"),
    Flip("data.*.max_documents", 30, {T, S2}, "data.old.en.max_documents"),
    Flip("data.*.max_tokens", 3000, {T, S1, S2}, "data.new.hu.max_tokens"),
    Flip("data.*.max_characters", 3000, {T, S1, S2}, "data.new.hu.max_characters"),
    Flip("data.*.weight", 3.0, {S1, S2}, "data.new.hu.weight"),
    Flip("data.*.language", "gr", {S}, "data.new.el.language"),
    Flip("data.*.language_label", "hr", set(), "data.new.hu.language_label"),  # no language filter is on
    Flip("data.held_out.by", "document", TRAINING_TEXT),
    Flip("data.held_out.fraction", 0.2, TRAINING_TEXT),
    Flip("data.held_out.max_megabytes", 1, set()),  # the text is smaller
    Flip("data.held_out.near_copy_threshold", 0.5, {T, S1, S2}),
    Flip("data.filters.normalize", "NFKC", TRAINING_PART),
    Flip("data.filters.fix_text", True, TRAINING_PART),
    Flip("data.filters.min_characters", 3, TRAINING_PART),
    Flip("data.filters.max_characters", 5000, TRAINING_PART),
    Flip("data.filters.language.*", {"threshold": 1e-9}, TRAINING_PART, "data.filters.language"),
    Flip("data.filters.exact_duplicates", True, {T, S1, S2}),
    Flip("data.filters.near_duplicates.*", {}, {T, S1, S2}, "data.filters.near_duplicates"),
    Flip("data.replay.share", 0.5, {T, S2}),
    Flip("data.replay.tokens", 2500, {T, S2}, also={"data.replay.share": None}),
    Flip("data.replay.characters", 2500, {T, S2}, also={"data.replay.share": None}),
    Flip("data.bad_rows", "skip", TRAINING_PART),
    Flip("data.max_document_bytes", 1000, TRAINING_PART),
    Flip("data.slice_bytes", 2000, TRAINING_PART),
    Flip("data.tokenizer", "model2", TRAINING_PART),
    Flip("data.separator", "<|endoftext|>", set()),  # which is what auto chooses
    Flip("data.bos", "none", set()),  # the tokenizer puts none there anyway
    Flip("data.seed", 18, TRAINING_TEXT),
    Flip("data.temperature", 2.0, {S1, S2}),
    Flip("data.isolate_documents", True, {S1, S2}),
    # Similarity and experts.
    Flip("similarity.tokens", 200, {S}),
    Flip("similarity.windows", "documents", {S}),
    Flip("similarity.sequence_length", 16, {S}),
    Flip("similarity.min_share", 0.0, set()),
    Flip("similarity.not_positive", "clamp", {A}),
    Flip("experts.allocation", "uniform", {A}, also={"experts.counts": None, "experts.num_new": 4}),
    Flip("experts.num_new", 4, {A}, also={"experts.counts": None, "experts.allocation": "uniform"}),
    Flip("experts.delta", 8.0, {A}, also={"experts.counts": None, "experts.allocation": "layerwise"}),
    Flip("experts.counts", [2, 2, 1, 4], {A}),
    Flip("experts.rounding", "largest_remainder", {A}),
    Flip("experts.top_k", 1, {A}),
    Flip("experts.init", "random", {U}),
    Flip("experts.init", "drop", {U}),
    Flip("experts.drop_ratio", 0.25, set()),  # of init: drop alone
    Flip("experts.drop_ratio", 0.25, {U}, also={"experts.init": "drop"}),
    Flip("experts.noise", 0.1, {U}),
    Flip("experts.write_copies", True, set()),  # the same weights
    Flip("experts.router", "reset", set()),  # of a further expansion alone
    Flip("experts.classifier_layers", [0], {A}),
    Flip("experts.classifier", "sequence", {A}),
    Flip("experts.similarity", "given.json", {A}),
    # Training.
    Flip("stage?.tokens", 1792, {T, S1, S2}, "stage1.tokens"),  # of which old text is replayed
    Flip("stage?.tokens", 1792, {S2}, "stage2.tokens"),
    Flip("stage?.sequence_length", 16, {S1}, "stage1.sequence_length"),
    Flip("stage?.global_batch_size", 4, {S1}, "stage1.global_batch_size"),
    Flip("stage?.lr", 1e-3, {S1}, "stage1.lr"),
    Flip("stage?.lr", 1e-3, {S2}, "stage2.lr"),
    Flip("stage?.min_lr_ratio", 0.0, {S2}, "stage2.min_lr_ratio"),
    Flip("stage?.warmup_ratio", 0.0, {S2}, "stage2.warmup_ratio"),
    Flip("stage?.betas", [0.9, 0.999], {S1}, "stage1.betas"),
    Flip("stage?.eps", 1e-6, {S1}, "stage1.eps"),
    Flip("stage?.weight_decay", 0.1, {S1}, "stage1.weight_decay"),
    Flip("stage?.gradient_clipping", 0.5, {S1}, "stage1.gradient_clipping"),
    Flip("stage?.activation_checkpointing", True, set(), "stage1.activation_checkpointing"),  # the same result
    Flip("stage?.z_loss_weight", 0.1, {S1}, "stage1.z_loss_weight"),
    Flip("stage?.z_loss_weight", 0.1, {S2}, "stage2.z_loss_weight"),
    Flip("stage1.balance", "bias", {S1}),
    Flip("stage1.bias_update_rate", 1e-2, {S1}, also={"stage1.balance": "bias"}),
    Flip("stage1.balance_weight", 0.1, {S1}),
    Flip("stage1.balance_scale", "reference", {S1}),
    Flip("stage1.balance_statistics", "local", {S1}),
    Flip("stage1.old_share", 0.2, {S1}),
    Flip("stage?.lpr", "reference", {S1}, "stage1.lpr"),
    Flip("stage1.lpr_weight", 0.1, {S1}),
    Flip("stage2.old_share", 0.6, {S2}),
    Flip("stage?.lpr", "reference", {S2}, "stage2.lpr"),
    Flip("stage2.lpr_weight", 0.2, {S2}),
    Flip("stage?.lpr_groups", "base", {S2}, "stage2.lpr_groups"),
    Flip("stage2.classifier_weight", 0.2, {S2}),
    Flip("stage2.router_kl_weight", 0.2, {S2}),
    Flip("bad_steps.*", 3.0, {S1, S2}, "bad_steps.norm_factor"),
    Flip("bad_steps.*", 50, {S1, S2}, "bad_steps.window"),
    Flip("bad_steps.*", 5, {S1, S2}, "bad_steps.stop_after"),
    Flip("deepspeed", "ds_configs/bf16_zero1.json", {S, S1, S2}),
    # What does not change a result.
    Flip("evaluate.window", 64, {E}),
    Flip("evaluate.prompts", {"el": "νερό"}, {E}),
    Flip("evaluate.new_tokens", 5, {E}, also={"evaluate.prompts": {"el": "νερό"}}),
    Flip("validate.*", 512, set(), "validate.every_tokens"),
    Flip("checkpoint.*", 5, set(), "checkpoint.keep"),
    Flip("parallel.*", 2, set(), "parallel.ranks"),
    Flip("log.*", True, set(), "log.ranks"),
    Flip("cluster.*", 3, set(), "cluster.max_restarts"),
]  # fmt: skip


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that has no keys of its own; those of a named set once, as NAME."""
    for name, field in section.model_fields.items():
        key, part = f"{prefix}{field.alias or name}", section_in(field.annotation)
        if part is None or key.endswith(".sources"):
            yield key
        else:
            yield from keys_of(part, f"{key}.NAME." if typing.get_origin(field.annotation) is dict else f"{key}.")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation, if there is one."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(section_in, typing.get_args(annotation))), None)


def test_every_key_is_in_the_table() -> None:
    elsewhere = ("base.", "experts.copy_of", "method.")  # in test_expansion.py and test_baseline_runs.py
    keys = [key for key in keys_of(RunConfig) if not key.startswith(elsewhere)]
    missing = [key for key in keys if not any(fnmatch(key, flip.key) for flip in FLIPS)]
    assert missing == []


class Finished(NamedTuple):
    """A run that is done: its settings, and each step's inputs."""

    tree: Tree
    context: RunContext
    inputs: dict[str, Tree]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pools: Pools) -> Finished:
    """A run with every kind of set, trained and evaluated."""
    folder = tmp_path_factory.mktemp("keys")
    corpus, more = save_corpus(folder / "text", ["en", "el", "hu", "tr"]), folder / "more"
    save_corpus(more, ["en", "el", "hu", "tr"], pages=70)
    save_model(folder / "model2", tie_word_embeddings=True)
    tokenizer = json.loads((folder / "model2" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 299, "content": "<new>"})
    (folder / "model2" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "lines.txt").write_text("one line of text\nand another one\n")
    pairs = {"el&hu": [0.4, 0.3, 0.2, 0.1], "el&en": [0.4, 0.3, 0.2, 0.1], "hu&en": [0.4, 0.3, 0.2, 0.1]}
    (folder / "given.json").write_text(json.dumps({"old": ["en"], "new": ["el", "hu"], "pairs": pairs}))
    for name, rows in (("hub", ("a", "b")), ("hub2", ("c", "d"))):
        save_hub(folder / name, rows)
    tree = run_tree(
        folder,
        data={
            "new": {
                "el": {"sources": [{"path": str(corpus["el"])}, {"path": str(more / "el.jsonl")}]},
                "hu": {"path": str(corpus["hu"]), "weight": 0.5},
            },
            "watch": {
                "tr": {"path": str(corpus["tr"])},
                "lines": {"path": str(folder / "lines.txt")},
                "hub": {"hub": str(folder / "hub"), "config": "a"},
            },
            "benchmarks": {"quiz": {"path": str(more / "tr.jsonl")}},
            "replay": {"share": 2.0},
        },
        similarity={"tokens": 300},
    )
    extend_tokenizer(parse_run(tree, "x").preparation, 20, folder / "extended")
    assert run(pools, tree) == [T, S, A, U, S1, S2, E]
    context = RunContext(parse_run(tree, "x"), quiet=True)
    return Finished(tree, context, {step.name: step.inputs(context) for step in STEPS if step.keeps_manifest})


def save_hub(folder: Path, rows: tuple[str, str]) -> None:
    """A folder as a dataset's repository, with two configurations of two splits."""
    folder.mkdir()
    configurations = []
    for name in ("a", "b"):
        for split, word in zip(("train", "test"), rows, strict=True):
            text = json.dumps({"text": f"{word} {name} some words of it", "page": word}) + "\n"
            (folder / f"{name}-{split}.jsonl").write_text(text)
        files = "".join(f"\n  - split: {split}\n    path: {name}-{split}.jsonl" for split in ("train", "test"))
        configurations.append(f"- config_name: {name}\n  data_files:{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configurations) + "\n---\n")


def with_value(tree: Tree, key: str, value: Any, folder: Path) -> None:
    """Change a key in place; a relative path is one of the test's folder."""
    *parents, last = key.split(".")
    for name in parents:
        child = tree.get(name)
        tree[name] = child if isinstance(child, dict) else {}
        tree = tree[name]
    is_ours = isinstance(value, str) and ((folder / value).exists())
    if isinstance(value, list) and last == "sources":
        value = [{"path": str(folder / source["path"])} for source in value]
    tree[last] = str(folder / value) if is_ours else value


@pytest.mark.parametrize("flip", FLIPS, ids=lambda flip: flip.changed or flip.key)
def test_a_key_makes_those_steps_stale_that_read_it_and_no_others(
    finished: Finished, flip: Flip, tmp_path: Path
) -> None:
    folder, key = Path(finished.tree["cache_dir"]).parent, flip.changed or flip.key
    tree = copy.deepcopy(finished.tree) | {"output_dir": str(tmp_path / "runs")}
    ignore = shutil.ignore_patterns("step*")  # checkpoints
    shutil.copytree(folder / "runs", tmp_path / "runs", symlinks=True, ignore=ignore)
    new = str(tmp_path / "elsewhere") if flip.value == "elsewhere" else flip.value
    for changed, value in {**flip.also, key: new}.items():
        with_value(tree, changed, value, folder)
    if key in ("name", "output_dir", "cache_dir"):  # another run or cache, of the same text
        assert step_named(T).inputs(RunContext(parse_run(tree, "x"), quiet=True)) == finished.inputs[T]
        return
    context = do_steps(RunContext(parse_run(tree, "x"), force=True, quiet=True), T)
    stale = set()
    for name, inputs in finished.inputs.items():
        changes = differences(inputs, step_named(name).inputs(context))
        if changes:
            stale.add(name)
            lines = explain(name, changes, finished.context.settings, context.settings)
            assert any(key in line or key.startswith(line.split(" ")[0]) for line in lines), (name, lines)
    assert stale == flip.stale

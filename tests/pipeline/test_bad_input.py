"""A user's mistakes: one line that says what and how to fix it, exit code 2, nothing half-written.

Run: pytest tests/pipeline/test_bad_input.py
"""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from common.files import write_json
from pipeline.checkpoint.store import write_manifest
from pipeline.cli.main import main
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointManifest
from pipeline.records.run_folder import RunFolder
from pipeline.run.context import RunContext
from tests.helpers.tiny import do_steps, parse_run, prepared_run, run_tree, save_model

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run that is done up to upcycling."""
    folder = tmp_path_factory.mktemp("bad_input")
    prepared_run(folder)
    return folder


def text_file(content: bytes, suffix: str = ".jsonl") -> Callable[[Path, Tree], None]:
    """Make the Greek set's file hold these bytes."""

    def change(folder: Path, tree: Tree) -> None:
        path = folder / f"el{suffix}"
        path.write_bytes(content)
        tree["data"]["new"]["el"]["path"] = str(path)

    return change


def setting(key: str, value: Any) -> Callable[[Path, Tree], None]:
    """Set a dotted key."""

    def change(_folder: Path, tree: Tree) -> None:
        *parents, last = key.split(".")
        for part in parents:
            tree = tree.setdefault(part, {})
        tree[last] = value

    return change


def without(key: str) -> Callable[[Path, Tree], None]:
    """Remove a dotted key."""

    def change(_folder: Path, tree: Tree) -> None:
        *parents, last = key.split(".")
        for part in parents:
            tree = tree[part]
        del tree[last]

    return change


def both(*changes: Callable[[Path, Tree], None]) -> Callable[[Path, Tree], None]:
    """Several changes."""

    def change(folder: Path, tree: Tree) -> None:
        for each in changes:
            each(folder, tree)

    return change


def small_vocabulary(folder: Path, tree: Tree) -> None:
    """A model whose vocabulary ends before its tokenizer's."""
    save_model(folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    tree["model"]["path"] = str(folder / "small")


def negative_similarity(_folder: Path, tree: Tree) -> None:
    """What was measured of the run's model says that a layer's languages are opposite."""
    tree["experts"] = {"allocation": "layerwise", "num_new": 6}
    tree["name"] = "negative"
    run = parse_run(tree, "x")
    folder = RunFolder.create(run)
    do_steps(RunContext(run), "tokenize", "similarity")
    measured = json.loads((folder.path / "similarity.json").read_text())
    write_json(folder.path / "similarity.json", {**measured, "by_layer": [0.2, -0.01, 0.3, 0.4]})


def checkpoint_of_another(what: str) -> Callable[[Path, Tree], None]:
    """A checkpoint in the run's folder that says it is of another model, plan or tokenizer."""

    def change(folder: Path, tree: Tree) -> None:
        tree["output_dir"] = str(folder / "runs")
        shutil.copytree(Path(tree["cache_dir"]).parent / "runs", folder / "runs", symlinks=True)
        context = RunContext(parse_run(tree, "x"))
        manifest = CheckpointManifest(
            identity=context.identity(1).model_copy(update={what: "other"}), stage=1, step=1, samples=8, best_value=None,
            best_tag="", skipped_steps={}, ranks=1, ep_size=1, max_imbalance=1.3, expert_plan={},
        )  # fmt: skip
        tag = context.folder / "stage1" / "step000001"
        tag.mkdir(parents=True)
        write_manifest(tag, manifest)

    return change


def a_base(_folder: Path, tree: Tree) -> None:
    """The run that is done up to upcycling, to be expanded."""
    tree["base"] = str(Path(tree["output_dir"]) / "tiny")


def a_baseline_to_expand(folder: Path, tree: Tree) -> None:
    """A baseline's run."""
    baseline = {**tree, "output_dir": str(folder / "runs"), "name": "full", "method": "full"}
    tree["base"] = str(RunFolder.create(parse_run(baseline, "x")).path)
    tree["name"] = "expanded"


PUBLISHED = Path(__file__).parents[1] / "golden" / "llama3.2-3b-g1-similarity.json"
ROW = json.dumps({"text": "a page", "page": "p"}).encode() + b"\n"
COUNTS = {"allocation": "explicit", "counts": [3, 2, 1, 4]}

# (what is wrong, the change, the verb that meets it, what the one line must say)
TABLE: list[tuple[str, Callable[[Path, Tree], None], list[str], list[str]]] = [
    ("unknown key", setting("stage1.learning_rate", 1), ["tokenize"], ["stage1.learning_rate", "unknown key"]),
    ("unknown key with a near one", setting("stage1.token", 1), ["tokenize"], ["stage1.token", "did you mean tokens"]),
    ("wrong type", setting("stage1.tokens", "many"), ["tokenize"], ["stage1.tokens", "'many'", "integer"]),
    ("missing key", without("stage1.tokens"), ["tokenize"], ["stage1.tokens", "missing"]),
    ("old and new", setting("data.new.english", {"path": "x", "language": "en"}), ["tokenize"], ["'en'", "both old and new"]),
    ("no old set in stage 2", without("data.old"), ["tokenize"], ["data.old", "stage2"]),
    ("no stage 2", without("stage2"), ["train", "--stage", "2"], ["stage2", "no such section"]),
    ("a path that does not exist", setting("data.new.el.path", "none/el.jsonl"), ["tokenize"], ["data.new.el.path", "none/el.jsonl"]),
    ("an empty file", text_file(b""), ["tokenize"], ["el.jsonl", "empty"]),
    ("not gzip", text_file(ROW, ".jsonl.gz"), ["tokenize"], ["el.jsonl.gz"]),
    ("truncated gzip", text_file(gzip.compress(ROW * 500)[:-20], ".jsonl.gz"), ["tokenize"], ["el.jsonl.gz"]),
    ("not UTF-8", text_file(ROW + b'{"text": "\xff\xfe", "page": "q"}\n'), ["tokenize"], ["el.jsonl", "row 2", "UTF-8"]),
    ("a row that is not JSON", text_file(ROW + b"oops\n"), ["tokenize"], ["el.jsonl", "row 2", "JSON"]),
    ("a row without the text field", text_file(ROW + b'{"page": "q"}\n'), ["tokenize"], ["el.jsonl", "row 2", "text"]),
    ("a row without the page", text_file(ROW + b'{"text": "b"}\n'), ["tokenize"], ["el.jsonl", "row 2", "page"]),
    ("a tokenizer that does not fit", small_vocabulary, ["tokenize"], ["vocabulary", "99"]),
    ("a separator that is not there", setting("data.separator", "<eod>"), ["tokenize"], ["<eod>"]),
    ("a budget below one expert", setting("experts", {"num_new": 0}), ["tokenize"], ["num_new", "0", "at least 1"]),
    ("noise on what is no copy", setting("experts", {"num_new": 4, "init": "drop", "noise": 0.1}), ["tokenize"], ["noise: 0.1", "init is drop"]),
    ("two budgets", setting("experts", {"num_new": 3, "delta": 8.0}), ["tokenize"], ["num_new or delta"]),
    ("a plan of the wrong length", setting("experts", {**COUNTS, "counts": [2, 2]}), ["allocate"], ["experts.counts", "2 numbers", "4 layers"]),
    ("a count below 1", setting("experts", {**COUNTS, "counts": [2, 0, 2, 2]}), ["allocate"], ["counts[1]", "below 1"]),
    ("top_k above what a layer has", setting("experts", {**COUNTS, "top_k": 3}), ["allocate"], ["top_k", "3", "layer 1"]),
    ("a classifier on a dense layer", setting("experts", {**COUNTS, "classifier_layers": [2]}), ["allocate"], ["layer 2", "dense"]),
    ("a classifier beyond the model", setting("experts", {**COUNTS, "classifier_layers": [9]}), ["allocate"], ["9", "not a layer"]),
    ("more classifiers than routers", setting("experts", {**COUNTS, "classifier_layers": 4}), ["allocate"], ["4 layers", "only 3"]),
    ("similarity not positive", negative_similarity, ["allocate"], ["layer 1", "-0.01", "not positive"]),
    ("a file of similarities that is not there", setting("experts", {"num_new": 6, "similarity": "none.json"}), ["allocate"], ["experts.similarity", "none.json", "not there"]),
    ("similarities of a model with more layers", setting("experts", {"num_new": 6, "similarity": str(PUBLISHED)}), ["tokenize"], ["experts.similarity", "28 layers", "the model has 4"]),
    ("a file that holds no similarities", setting("experts", {"num_new": 6, "similarity": "ds_configs/fp32_zero1.json"}), ["allocate"], ["experts.similarity", "fp32_zero1.json", "no similarities"]),
    ("budgets that are no numbers", setting("experts", {"num_new": 6}), ["allocate", "--budgets", "4,x"], ["--budgets 4,x", "30,60,90"]),
    ("budgets of an allocation that takes none", setting("experts", COUNTS), ["allocate", "--budgets", "4"], ["--budgets", "explicit takes no budget"]),
    ("budgets before similarities are measured", both(setting("experts", {"num_new": 6}), setting("name", "fresh")), ["allocate", "--budgets", "4"], ["--budgets", "fresh has no similarity.json yet", "--until similarity"]),
    ("an ep_size that does not divide the ranks", setting("parallel", {"ranks": 3, "ep_size": 2}), ["train"], ["ep_size", "2", "3"]),
    ("an imbalance below balance", setting("parallel", {"max_imbalance": 0.5}), ["tokenize"], ["parallel.max_imbalance", "0.5", "1"]),
    ("steps to profile that end before they begin", setting("log.profile_steps", [5, 2]), ["tokenize"], ["log", "profile_steps", "first"]),
    ("more ranks than a machine holds", both(setting("parallel.ranks", 10**6), setting("stage1.global_batch_size", 10**6), setting("stage1.tokens", 10**9)), ["run"], ["1000000 ranks do not fit", "cores and no GPU", "parallel.ranks"]),
    ("more ranks to check than a machine holds", setting("seed", 17), ["check", "--ranks", "100000"], ["100000 ranks do not fit", "--ranks"]),
    ("a micro-batch above the batch", setting("parallel", {"micro_batch_size": 9}), ["train"], ["micro_batch_size", "9", "8 samples"]),
    ("too few tokens for one batch", setting("stage1.tokens", 100), ["tokenize"], ["stage1", "100", "less than one batch"]),
    ("a sample beyond the model's positions", setting("stage1", {"tokens": 10**7, "sequence_length": 10**6, "global_batch_size": 1}), ["train", "--stage", "1"], ["stage1.sequence_length", "2048 positions"]),
    ("a learning rate that is not finite", setting("stage1.lr", float("inf")), ["tokenize"], ["stage1.lr", "inf", "finite"]),
    ("more tokens than there are", setting("stage1.tokens", 10**23), ["estimate"], ["stage1.tokens", "1000000000000000"]),
    ("a folder that can't be made", setting("output_dir", "/proc/none"), ["tokenize"], ["/proc/none", "can't be made", "output_dir"]),
    ("no ranks", setting("seed", 17), ["estimate", "--ranks", "0"], ["ranks 0", "at least 1"]),
    ("a model that is not there", setting("model.path", "./none"), ["tokenize"], ["model.path", "none"]),
    ("a DeepSpeed config that is not there", setting("deepspeed", "ds_configs/none.json"), ["train"], ["deepspeed", "none.json"]),
    ("a checkpoint that is not there", lambda folder, tree: None, ["evaluate", "--checkpoint", "stage1/best"], ["stage1/best", "no complete checkpoint"]),
    ("a checkpoint of another model", checkpoint_of_another("model"), ["evaluate", "--checkpoint", "stage1"], ["step000001", "another model"]),
    ("a checkpoint of another plan", checkpoint_of_another("plan"), ["evaluate", "--checkpoint", "stage1"], ["step000001", "another expert plan"]),
    ("a checkpoint of another tokenizer", checkpoint_of_another("tokenizer"), ["evaluate", "--checkpoint", "stage1"], ["step000001", "another tokenizer"]),
    ("a monitor that is not installed", setting("log", {"wandb": True, "tensorboard": False}), ["train"], ["log.wandb", "pip install wandb"]),
    ("an unknown method", setting("method", "loar"), ["tokenize"], ["method.name", "'loar'", "'llama_pro'"]),
    ("an option of another method", setting("method", {"name": "full", "rank": 8}), ["tokenize"], ["method", "rank: is an option of method lora", "the method is full"]),
    ("a method with groups of experts", both(setting("method", "full"), setting("parallel", {"ranks": 2, "ep_size": 2})), ["train"], ["parallel.ep_size: 2", "method full has no experts", "set it to 1"]),
    ("a method with new tokens", both(setting("method", "llama_pro"), setting("model.tokenizer", "extended")), ["tokenize"], ["model.tokenizer: given", "method llama_pro trains the dense model by its own tokenizer", "set it to null"]),
    ("a method that expands a run", both(setting("method", "lora"), a_base), ["tokenize"], ["method: lora trains a dense model", "base"]),
    ("a baseline to expand", a_baseline_to_expand, ["similarity"], ["base.run", "is a baseline, full", "has experts"]),
    ("more blocks than layers", setting("method", {"name": "llama_pro", "blocks": 9}), ["train"], ["method.blocks: 9", "4 layers"]),
    ("LoRA without peft", setting("method", "lora"), ["tokenize"], ["method: lora", "pip install peft"]),
    ("stage 2 of a baseline", setting("method", "full"), ["train", "--stage", "2"], ["stage2: method full has stage 1 alone"]),
    ("budgets of a baseline", setting("method", "full"), ["allocate", "--budgets", "4"], ["--budgets", "method full has no experts"]),
    ("replay without old text", both(setting("method", "full"), setting("stage1.old_share", 0.25), without("data.old")), ["tokenize"], ["data.old", "stage1.old_share"]),
    ("a mixture without experts", without("experts"), ["tokenize"], ["experts: missing", "add it"]),
    ("a mixture of no experts", setting("experts", {"allocation": "none"}), ["tokenize"], ["experts.allocation: none", "method moe has experts"]),
    ("a step before its turn", setting("name", "fresh"), ["upcycle"], ["allocate", "not done"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "verb", "says"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_one_line_and_exit_code_2(
    change: Callable[[Path, Tree], None], verb: list[str], says: list[str], base: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for package in ("wandb", "peft"):
        if f"pip install {package}" in says:
            monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    tree = run_tree(base)
    change(tmp_path, tree)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["pipeline", verb[0], str(path), *verb[1:], "--force"])
    before = {p for p in base.rglob("*") if "tiny" in p.parts}
    from pipeline.cli.main import command_line

    capfd.readouterr()
    assert command_line() == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ") or not line.strip()]
    assert len(lines) == 1, lines
    for words in says:
        assert words in lines[0], lines[0]
    assert before <= set(base.rglob("*"))
    assert not [p.name for p in base.rglob("*.partial")]


def test_no_is_norwegian_in_keys_and_values(tmp_path: Path, base: Path) -> None:
    from pipeline.config.load import load_run

    text = yaml.safe_dump(run_tree(base)).replace("    el:", "    no:\n      path: no.jsonl\n    el:")
    (tmp_path / "run.yaml").write_text(text.replace("lr: 0.01", "lr: 1e-2"), encoding="utf-8")
    run = load_run(tmp_path / "run.yaml")
    assert run.data.new["no"].language == "no"
    assert run.stage1.lr == 0.01


def test_a_damaged_plan_names_layer_and_number(tmp_path: Path) -> None:
    plan = ExpertPlan.first_expansion([3, 2], old=["en"], new=["el"], top_k=2, classifier_layers=[])
    plan.save(tmp_path / "expert_plan.json")
    tree = json.loads((tmp_path / "expert_plan.json").read_text())
    write_json(tmp_path / "expert_plan.json", {**tree, "counts": [3, 5]})
    with pytest.raises(UserError, match="layer 1 has 5 experts, but its rounds add up to 2"):
        ExpertPlan.load(tmp_path / "expert_plan.json")


def test_changed_settings_ask_for_force(base: Path, tmp_path: Path) -> None:
    tree = run_tree(base)
    tree["experts"]["counts"] = [2, 2, 2, 2]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(UserError, match=r"allocate: done in .* with other inputs: experts.counts was .*--force"):
        main(["allocate", str(tmp_path / "run.yaml")])

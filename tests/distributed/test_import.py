"""A run is exported, imported and expanded further. Run: pytest tests/distributed/test_import.py"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.files import read_json, write_json
from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.tensors import load_tensors
from pipeline.cli.main import main
from pipeline.method.upcycle import load_upcycled
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import UpcycledManifest
from pipeline.records.expansion import EXPANSION_FILE
from pipeline.records.run_folder import PLAN_FILE, SIMILARITY_FILE, RunFolder
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.importing import import_exported
from tests.distributed.conftest import Pools
from tests.distributed.rounds import BALANCED, Model, imported, run, same, tree_of, with_changes
from tests.helpers.extended import extended_tree
from tests.helpers.tiny import do_steps, parse_run, save_corpus, save_model

Tree = dict[str, Any]
BF16 = {"deepspeed": "ds_configs/bf16_zero1.json"}
UP_TO_UPCYCLE = ("tokenize", "similarity", "allocate", "upcycle")
IDS = torch.arange(48).view(2, 24) * 11 % 290


def bf16_model(folder: Path) -> Path:
    """A dense model whose weights are in bf16."""
    model = AutoModelForCausalLM.from_pretrained(save_model(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def expanded(tree: Tree) -> RunContext:
    """A run that is done up to upcycling."""
    context = RunContext(parse_run(tree, "x"))
    RunFolder.create(context.run)
    do_steps(context, *UP_TO_UPCYCLE)
    return RunContext(context.run)


def check_same_start(one: RunContext, other: RunContext) -> None:
    """Two runs start from the same tensors, bit by bit, and the models that they are of compute the same."""
    assert one.plan == other.plan
    assert read_json(one.folder / SIMILARITY_FILE) == read_json(other.folder / SIMILARITY_FILE)
    folders = [context.upcycled / "upcycled" for context in (one, other)]
    names = [sorted(path.name for path in folder.glob("*.pt")) for folder in folders]
    assert names[0] == names[1] and len(names[0]) > 1
    for name in names[0]:
        states = [load_tensors(folder / name) for folder in folders]
        modules = [state.get("module", state) for state in states]
        assert same(*modules), name
    logits = []
    for context in (one, other):
        model = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
        with torch.no_grad():
            logits.append(model(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(*logits)
    manifests = [read_manifest(context.upcycled, UpcycledManifest) for context in (one, other)]
    of_start = {"model", "files"}
    assert manifests[0].model_dump(exclude=of_start) == manifests[1].model_dump(exclude=of_start)


CASES: dict[str, tuple[bool, Tree, str | None, str | None]] = {
    "fp32": (False, {}, None, None),
    "bf16": (True, BF16, None, None),
    "bf16 from weights in fp32": (False, BF16, None, "fp32"),
    "fp32 from weights in bf16": (True, {}, None, None),
    "a stage 1": (False, {}, "stage1", None),
    "balanced by biases": (False, BALANCED, None, None),
}


@pytest.mark.parametrize(("is_bf16", "changes", "label", "dtype"), [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] if "from weights" in name else [])
    for name, case in CASES.items()
])  # fmt: skip
def test_a_second_round_from_an_import_starts_bit_by_bit_as_one_from_the_run(
    pools: Pools, tmp_path: Path, is_bf16: bool, changes: Tree, label: str | None, dtype: str | None
) -> None:
    if is_bf16:
        bf16_model(tmp_path / "model")
    first, second = (with_changes(tree_of(tmp_path, number, ranks=1), changes) for number in (0, 1))
    run(pools, first, 1)
    base = {"run": second["base"], "checkpoint": label or "stage2"}
    folder = imported(first, tmp_path, label, dtype)
    other = second | {"name": "from-import", "base": str(folder)}
    check_same_start(expanded(second | {"base": base}), expanded(other))


@pytest.mark.slow  # a second round from an import is tested above
def test_a_third_round_from_an_import_of_a_second_trains_to_the_same_weights_and_scores(
    pools: Pools, tmp_path: Path
) -> None:
    trees = [tree_of(tmp_path, number, ranks=1) for number in range(3)]
    for tree in trees[:2]:
        run(pools, tree, 1)
    other = trees[2] | {"name": "from-import", "base": str(imported(trees[1], tmp_path))}
    contexts = [run(pools, tree, 1) for tree in (trees[2], other)]
    check_same_start(*contexts)
    models = [Model.of(context) for context in contexts]
    assert same(*(dict(model.module.state_dict()) for model in models))
    found = [read_json(context.folder / "evaluation.json") for context in contexts]
    assert found[0]["sets"] == found[1]["sets"] and found[0]["own_experts"] == found[1]["own_experts"]


@pytest.mark.parametrize("vocab_size", [300, 310], ids=["no padding", "padding"])
def test_rows_of_new_tokens_and_both_tokenizers_come_with_it(pools: Pools, tmp_path: Path, vocab_size: int) -> None:
    """Rows that the dense model has for the ids of new tokens are used nowhere; they are not in an export."""
    changes: Tree = {"name": "g1", "parallel": {"ranks": 1, "micro_batch_size": 1}}
    first = extended_tree(tmp_path, vocab_size=vocab_size, **changes)
    run(pools, first, 1)
    folder = imported(first, tmp_path)
    corpus, data = save_corpus(tmp_path / "text", ["tr"]), first["data"]
    sets = {"old": {**data["old"], **data["new"]}, "new": {"tr": {"path": str(corpus["tr"])}}}
    second = {**first, "name": "g2", "data": {**data, **sets}, "base": str(tmp_path / "runs" / "g1")}
    del second["model"]
    contexts = [expanded(second), expanded(second | {"name": "from-import", "base": str(folder)})]
    assert contexts[0].planned.tokenizer_key == contexts[1].planned.tokenizer_key
    if vocab_size == 300:
        check_same_start(*contexts)
    else:
        assert contexts[0].plan == contexts[1].plan
        logits = []
        for context in contexts:
            model = load_upcycled(context.upcycled, context.plan, torch.float32, classifiers=True)
            with torch.no_grad():
                logits.append(model(input_ids=torch.arange(340).view(2, -1), use_cache=False).logits)
        assert torch.equal(*logits)
    with pytest.raises(UserError, match="a tokenizer can be extended only in the first expansion") as caught:
        expanded(second | {"name": "x", "base": str(folder), "model": {"path": str(tmp_path / "model")}})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def exported(trained: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run that is done; tests change copies."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export_run(RunContext(parse_run(trained, "x")), None, None, folder)
    return folder


def test_the_export_names_no_path_of_the_machine_and_the_import_holds_the_plan(exported: Path, tmp_path: Path) -> None:
    text = (exported / EXPANSION_FILE).read_text(encoding="utf-8")
    assert str(exported.parents[1]) not in text and "/tmp" not in text
    assert main(["import", str(exported), "--to", str(tmp_path / "imported")]) == 0
    plan = ExpertPlan.load(tmp_path / "imported" / PLAN_FILE)
    assert plan == ExpertPlan.model_validate(json.loads(text)["upcycled"]["plan"])
    assert [one.languages for one in plan.rounds] == [("en",), ("el", "hu")]


def test_what_can_t_be_imported_is_one_line_and_writes_nothing(exported: Path, trained: Tree, tmp_path: Path) -> None:
    def changed(name: str, **values: Any) -> Path:
        shutil.copytree(exported, tmp_path / name)
        path = tmp_path / name / EXPANSION_FILE
        write_json(path, {**read_json(path), **values})
        return tmp_path / name

    export_run(RunContext(parse_run(trained, "x")), None, None, tmp_path / "native", "auto")
    export_run(RunContext(parse_run(trained, "x")), None, "bf16", tmp_path / "bf16")
    damaged = changed("damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (changed("missing") / "model.safetensors").unlink()
    other_plan = changed("other plan") / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(other_plan).items() if "experts" not in name}, other_plan)
    write_json(other_plan.with_name(EXPANSION_FILE), read_json(exported / EXPANSION_FILE) | {"files": {}})
    upcycled = read_json(exported / EXPANSION_FILE)["upcycled"]
    (changed("not json") / EXPANSION_FILE).write_text("{", encoding="utf-8")
    cases = [
        (tmp_path, f"holds no {EXPANSION_FILE}; name a folder that python -m pipeline export wrote of a run with"),
        (Path(trained["model"]["path"]), f"holds no {EXPANSION_FILE}"),
        (tmp_path / "nowhere", f"holds no {EXPANSION_FILE}"),
        (tmp_path / "native", "native was exported as ernie4_5_moe, which holds experts in another form; export the"),
        (tmp_path / "bf16", "bf16 holds weights in bfloat16, but its run trained in float32 from weights in float32;"),
        (
            changed("biases", selection_biases=True),
            "mlp.gate.selection_bias has the shape None, but by expansion.json it has [3];",
        ),
        (tmp_path / "damaged", "damaged/model.safetensors is damaged or missing; copy or export it again"),
        (tmp_path / "missing", "missing/model.safetensors is damaged or missing"),
        (tmp_path / "other plan", "mlp.experts.gate_up_proj has the shape None, but by expansion.json it has [3, 96,"),
        (tmp_path / "not json", "expansion.json: can't be read as JSON"),
        (changed("no plan", upcycled={**upcycled, "plan": {"counts": [2]}}), "upcycled.plan is damaged ("),
        (changed("newer", new_key=1), "expansion.json: new_key: Extra inputs are not permitted"),
    ]
    for source, line in cases:
        with pytest.raises(UserError, match=re.escape(line)) as caught:
            import_exported(source, tmp_path / "imported")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("*imported*"))
    (tmp_path / "imported").mkdir()
    with pytest.raises(UserError, match="imported exists; name another folder with --to"):
        import_exported(exported, tmp_path / "imported")


def test_a_base_that_is_not_as_it_was_imported_is_one_line(exported: Path, trained: Tree, tmp_path: Path) -> None:
    corpus, data = save_corpus(tmp_path / "text", ["tr"]), trained["data"]
    sets = {"old": {**data["old"], **data["new"]}, "new": {"tr": {"path": str(corpus["tr"])}}}
    places = {key: str(tmp_path / key) for key in ("output_dir", "cache_dir")}
    tree = {**trained, "name": "g2", "data": {**data, **sets}, **places}
    del tree["model"]
    with pytest.raises(UserError, match=re.escape(f"tiny was exported; first: python -m pipeline import {exported}")):
        parse_run({**tree, "base": str(exported)}, "x")
    import_exported(exported, tmp_path / "imported")
    with pytest.raises(
        UserError, match=r"base.checkpoint: stage1, but .*imported was imported and has one checkpoint"
    ):
        expanded({**tree, "base": {"run": str(tmp_path / "imported"), "checkpoint": "stage1"}})
    weights = next((tmp_path / "imported" / "upcycled" / "upcycled").glob("layer_*.pt"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{weights.name} damaged or missing; import it again") as caught:
        expanded({**tree, "base": str(tmp_path / "imported")})
    assert "\n" not in str(caught.value)

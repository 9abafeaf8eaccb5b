"""The verb export on a trained run. Run: pytest tests/distributed/test_export.py"""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from pipeline.export.card import CardFacts, model_card
from pipeline.export.own_code import VllmFused
from pipeline.model.backbone import load_dense
from pipeline.records.evaluation import Change, Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from tests.distributed.rounds import Model
from tests.export.test_folder import FIRST, mixture
from tests.helpers.tiny import parse_run

IDS = torch.arange(30).view(2, 15) * 7 % 290


def context_of(tree: dict[str, Any], **options: Any) -> RunContext:
    return RunContext(parse_run(tree, "x"), **options)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("label", ["stage1", "stage2"])
def test_a_stage_s_export_gives_its_logits(
    trained: dict[str, Any], tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(trained)
    export_run(context, label, None, tmp_path / "exported")
    with torch.no_grad():
        expected = Model.of(context, label).module(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits_of(tmp_path / "exported"), expected, rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert re.search(rf"export: {label} as .*exported, .* M parameters, .* differ by at most \S+ \(logits up to", said)


def test_as_an_architecture_of_transformers_it_needs_no_code_and_gives_the_logits(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(trained)
    export_run(context, None, None, tmp_path / "exported", "auto")
    with torch.no_grad():
        expected = Model.of(context).module(input_ids=IDS, use_cache=False).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().out
    assert re.search(r"native: ernie4_5_moe, \d+\.\d M of the parameters are copies and zeros that it needs; ", said)
    assert "trust_remote_code" not in said
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert "own class Ernie4_5_MoeForCausalLM" in card.text and "trust_remote_code" not in card.text
    with pytest.raises(UserError, match="export --native mixtral: can't say this mixture: it has as many experts in"):
        export_run(context, None, None, tmp_path / "other", "mixtral")
    assert not (tmp_path / "other").exists()


def test_for_vllm_s_kernel_the_folder_is_the_same_but_for_a_key(trained: dict[str, Any], tmp_path: Path) -> None:
    context = context_of(trained)
    export_run(context, None, None, tmp_path / "plain")
    export_run(context, None, None, tmp_path / "fused", None, "vllm-fused")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "fused")]
    configs = [json.loads(one.pop("config.json")) for one in files]
    expansions = [json.loads(one.pop("expansion.json")) for one in files]
    assert files[0] == files[1]
    assert configs[1] == configs[0] | {"num_experts": 4} and "num_experts" not in configs[0]
    assert expansions[1] == expansions[0] | {"form": "vllm-fused"}
    with pytest.raises(UserError, match="--serve vllm-fused: the second is for a folder with own code; give one"):
        export_run(context, None, None, tmp_path / "both", "auto", "vllm-fused")


def test_vllm_s_kernel_is_for_silu_and_for_classifiers_of_tokens(tmp_path: Path) -> None:
    sequences = FIRST.model_copy(update={"classifier": "sequence"})
    llama, gemma = (mixture(tmp_path / family, family, FIRST) for family in ("llama", "gemma"))
    assert VllmFused.why_not(llama, FIRST) is None
    assert "this model classifies whole sequences" in str(VllmFused.why_not(llama, sequences))
    wanted = "its kernel computes SiLU, and gemma's MLPs compute gelu_pytorch_tanh"
    assert VllmFused.why_not(gemma, FIRST) == wanted


def test_without_options_the_last_stage_goes_to_the_run_s_folder_in_its_own_dtype(trained: dict[str, Any]) -> None:
    context = context_of(trained, force=True)
    export_run(context, None, "bf16", None)
    model = AutoModelForCausalLM.from_pretrained(context.folder / "export", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.config.classifier_layers == [0, 3]
    export_run(context, None, None, None)
    assert (
        AutoModelForCausalLM.from_pretrained(context.folder / "export", trust_remote_code=True).dtype == torch.float32
    )


def test_the_card_says_what_came_of_it_and_what_the_hub_asks_for(trained: dict[str, Any], tmp_path: Path) -> None:
    context = context_of(trained)
    export_run(context, None, None, tmp_path / "exported")
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    evaluation = Evaluation.load(context.folder / EVALUATION_FILE)
    assert card.data.language == ["en", "el", "hu"]
    assert card.data.base_model is None, "the model is a folder"
    values = {one.dataset_type: one.metric_value for one in card.data.eval_results or []}
    assert values == {name: round(one.bits_per_character["stage2"], 4) for name, one in evaluation.sets.items()}
    for name, result in evaluation.sets.items():
        before, after = result.bits_per_character["base"], result.bits_per_character["stage2"]
        assert f"| {name} | {name} |" in card.text and f"| {before:.3f} | {after:.3f} |" in card.text
    worse = evaluation.forgotten("stage2")
    assert ("No known language got worse" in card.text) == (not worse)
    assert str(tmp_path.parent) not in card.text and str(Path(trained["cache_dir"]).parent) not in card.text


def test_the_card_says_which_licence_text_has_and_which_datasets_it_is_from(trained: dict[str, Any]) -> None:
    tree = copy.deepcopy(trained)
    tree["data"]["new"]["hu"] = {"sources": [{"hub": "owner/text", "license": "cc-by-4.0"}, {"path": "own/hu.jsonl"}]}
    tree["data"]["new"]["el"]["license"] = "mpl-2.0"
    facts = CardFacts(parse_run(tree, "x"), context_of(trained).plan, "stage2", None, None, "float32")
    card = model_card(facts)
    assert card.data.datasets == ["owner/text"]
    assert "- text, old: en (en) from en.jsonl (licence not recorded)" in card.text
    assert "- text, new: el (el) from el.jsonl (mpl-2.0)" in card.text
    assert "- text, new: hu (hu) from owner/text (cc-by-4.0), hu.jsonl (licence not recorded)" in card.text


def test_the_card_names_what_was_forgotten(trained: dict[str, Any]) -> None:
    context = context_of(trained)
    evaluation = Evaluation.load(context.folder / EVALUATION_FILE)
    worse = Change(percent=3.0, interval=1.0)
    english = evaluation.sets["en"].model_copy(update={"change": {"stage2": worse}})
    changed = evaluation.model_copy(update={"sets": {**evaluation.sets, "en": english}})
    facts = CardFacts(context.run, context.plan, "stage2", changed, "owner/model", "bfloat16")
    text = str(model_card(facts))
    assert "Worse than before, beyond the interval: en (+3.0 % +-1.0)." in text
    assert "[owner/model](https://huggingface.co/owner/model), which knows en" in text
    assert "base_model: owner/model" in text


def tune(base: Path, folder: Path, ids: torch.Tensor) -> Path:
    """The dense model after it was tuned to continue ``ids`` [B, L], with a chat template."""
    torch.manual_seed(0)
    model = load_dense(base, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(folder)
    return folder


def loss_of(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_a_graft_follows_instructions_as_the_instruct_model_does_and_still_knows_what_it_learned(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context, base = context_of(trained), Path(trained["model"]["path"])
    answers = torch.randint(1, 290, (1, 12), generator=torch.Generator().manual_seed(4)).repeat(4, 2)
    instruct = tune(base, tmp_path / "instruct", answers)
    export_run(context, None, None, tmp_path / "plain")
    export_run(context, None, None, tmp_path / "grafted", instruct=str(instruct))
    assert "graft: " in (said := capsys.readouterr().out) and "from the grafted model's, fp32" in said
    plain, grafted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True) for name in ("plain", "grafted")
    )
    before, after, tuned = (loss_of(one, answers) for one in (plain, grafted, load_dense(instruct, torch.float32)))
    assert tuned < 0.7 * before and after < before - 0.5 * (before - tuned)
    greek = torch.from_numpy(context.store.held_out("el").document(0)[:64].astype("int64")).unsqueeze(0)
    learned = loss_of(load_dense(base, torch.float32), greek) - loss_of(plain, greek)
    assert learned > 0 and loss_of(grafted, greek) < loss_of(plain, greek) + 0.5 * learned
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grafted")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"
    card = (tmp_path / "grafted" / "README.md").read_text()
    assert "instruct minus it, was added" in card and "before the difference of instruct was added" in card
    assert "graft" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_mistake_is_one_line_and_writes_nothing(trained: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "exported"
    (tmp_path / "there").mkdir()
    copied = dict(trained) | {"output_dir": str(tmp_path / "runs")}
    shutil.copytree(trained["output_dir"], tmp_path / "runs", symlinks=True)
    folder = tmp_path / "runs" / "tiny"
    cases = [
        ((None, None, target, None, None, str(tmp_path / "no")), f"--graft: {tmp_path / 'no'} does not exist; name a"),
        ((None, None, target, None, None, trained["model"]["path"]), "there is nothing to add; name another model"),
        ((None, None, tmp_path / "there"), "there exists; name another folder with --to, or replace it with --force"),
        (("base", None, target), "--checkpoint base: is the model that the run starts from; name a stage"),
        (("stage3", None, target), "--checkpoint stage3: unknown"),
        (("stage2/step000001", None, target), "holds no complete checkpoint step000001"),
    ]
    for arguments, line in cases:
        check_line(copied, arguments, line)
    damaged = next((folder / "stage2").glob("step*/mp_rank_00_model_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    check_line(copied, (None, None, target), "damaged")
    (folder / "manifests" / "stage2.json").unlink()
    check_line(copied, (None, None, target), "stage2")
    assert not target.exists() and not list(tmp_path.glob(".*partial"))


def check_line(tree: dict[str, Any], arguments: tuple[Any, ...], line: str) -> None:
    """The export is refused so, in one line."""
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        export_run(context_of(tree), *arguments)
    assert "\n" not in str(caught.value)

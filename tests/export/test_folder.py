"""An exported folder in a process that knows transformers alone. Run: pytest tests/export/test_folder.py"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.method import MethodConfig
from pipeline.export.export import Exported, export
from pipeline.export.remote_code import ROUTER_FILE
from pipeline.method.dense import extend
from pipeline.model.backbone import install_moe_layers, load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings, router
from tests.helpers.tiny import save_model

CLIENT = Path(__file__).with_name("client.py")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"]
COUNTS = [3, 1, 4, 2]
FIRST = ExpertPlan.first_expansion(COUNTS, old=["en"], new=["el"], top_k=2, classifier_layers=[0, 2])
SECOND = FIRST.expand([1, 2, 0, 1], languages=["hu"], classifier_layers=[0, 3])
QUICK = ("llama", "gemma2")  # the others are like one of them
CASES = [pytest.param((family, FIRST), id=family, marks=[] if family in QUICK else [pytest.mark.slow])
         for family in FAMILIES]  # fmt: skip
CASES.append(pytest.param(("llama", SECOND), id="two rounds"))


def mixture(folder: Path, family: str, plan: ExpertPlan, *, biases: bool = False, **options: Any) -> Any:
    """A model with random experts, routers, classifiers that take tokens for every group, and selection biases."""
    model = load_dense(save_model(folder, family, **options), torch.float32)
    install_moe_layers(model, plan, classifiers=True, selection_biases=biases)
    torch.manual_seed(7)
    for layer in moe_layers(model):
        for parameter in layer.local_experts.parameters():
            parameter.data.normal_(0, 0.15)
        layer.router.wg.weight.data.normal_(0, 0.5)
        if layer.router.classifier is not None:
            layer.router.classifier.weight.data.normal_(0, 0.5)
        if layer.router.selection_bias is not None:
            layer.router.selection_bias.normal_(0, 0.3)
    return model


@dataclass(frozen=True)
class Tried:
    """A folder, what the export says of it, and what the other process found."""

    plan: ExpertPlan
    folder: Path
    said: Exported
    found: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    """An export of a family's model, tried by the client."""
    family, plan = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{plan.num_groups}")
    said = export_of(family, plan, folder)
    return Tried(plan, folder / "exported", said, run_client(folder))


def export_of(family: str, plan: ExpertPlan, folder: Path) -> Exported:
    """An export, and beside it what the model in training makes of some tokens of every group."""
    model = mixture(folder / "dense", family, plan)
    ids = torch.randint(1, 290, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), collect_routings(model) as routings:
        reference = {"ids": ids, "logits": model(input_ids=ids, use_cache=False).logits}
    classes = [router.classify(one.class_logits_TC) for one in routings if one.class_logits_TC is not None]
    assert torch.cat(classes).unique().tolist() == list(range(plan.num_groups)), "tokens of every group"
    torch.save(reference, folder / "reference.pt")
    return export(model, plan, folder / "dense", folder / "exported", torch.float32, np.asarray(ids))


def run_client(folder: Path, *options: str, python: str = sys.executable, client: Path = CLIENT) -> dict[str, Any]:
    """What the other process writes down."""
    words = [python, "-I", str(client), str(folder / "exported"), str(folder / "reference.pt"),
             str(folder / "found.json"), *options]  # fmt: skip
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / "found.json").read_text()))


def test_logits_are_those_of_the_model_in_training(tried: Tried) -> None:
    assert tried.said.difference < 1e-5
    assert tried.found["eager"] == pytest.approx(tried.said.difference, abs=1e-6)
    assert tried.found["grouped_mm"] < 1e-4 and tried.found["batched_mm"] < 1e-4
    assert tried.found["parameters"] == tried.said.parameters


def test_generation_is_the_same_with_any_cache_and_with_padding_on_the_left(tried: Tried) -> None:
    for way in ("without a cache", "static cache", "left padding"):
        assert tried.found[way], way
    assert tried.found["token by token"] < 1e-4
    assert tried.found["sampling"] == tried.found["beams"] == 18
    assert tried.found["pipeline"]


def test_routers_stay_in_fp32_and_their_logits_can_be_had(tried: Tried) -> None:
    assert tried.found["bf16"] == ["torch.float32", "torch.bfloat16"]
    expected = [[72, count] for count in tried.plan.counts if count > 1]
    assert tried.found["router logits"] == expected


def test_saved_again_it_is_the_same_bit_by_bit_and_carries_its_code(tried: Tried) -> None:
    assert tried.found["saved and loaded"] and tried.found["saved code"]
    assert tried.found["base model"].startswith("Upcycled")


def test_it_computes_from_disk_what_does_not_fit(tried: Tried) -> None:
    assert tried.found["offloaded"]
    assert tried.found["offloaded difference"] < 1e-4


def test_it_trains_with_gradient_checkpointing(tried: Tried) -> None:
    assert tried.found["gradient checkpointing"] < 1e-4
    assert tried.found["router gradient"] > 0


@pytest.mark.slow
def test_it_compiles_without_a_break(tmp_path: Path) -> None:
    export_of("llama", FIRST, tmp_path)
    assert run_client(tmp_path, "--compile")["compiled"] < 1e-4


def test_the_router_is_the_one_of_training_byte_for_byte(tried: Tried) -> None:
    assert (tried.folder / ROUTER_FILE).read_bytes() == Path(str(router.__file__)).read_bytes()


def test_the_config_says_how_many_experts_each_layer_has_and_no_other_number(tried: Tried) -> None:
    config = json.loads((tried.folder / "config.json").read_text())
    modes = {file.stat().st_mode for file in tried.folder.iterdir()}
    assert len(modes) == 1, "all files can be read by the same people"
    assert config["expert_counts"] == list(tried.plan.counts)
    assert "num_experts" not in config
    assert config["old_experts"] == [list(tried.plan.old_experts(layer)) for layer in range(4)]


def test_experts_are_computed_as_asked_though_the_dense_model_was_loaded_before(tmp_path: Path) -> None:
    export_of("llama", FIRST, tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense").set_experts_implementation("eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation


def test_peft_trains_saves_loads_and_merges_lora_on_attention_and_experts(tmp_path: Path) -> None:
    export_of("llama", FIRST, tmp_path)
    results = run_client(tmp_path, client=CLIENT.with_name("client_peft.py"))
    assert {name: found["of experts"] > 0 for name, found in results.items()} == {"attention": False, "experts": True}
    for found in results.values():
        assert found["before"] < 1e-4 and found["losses"][-1] < found["losses"][0] and found["moved"] > 1e-2
        assert found["loaded"] < 1e-4 and found["merged"] < 1e-3


def test_adapters_that_are_merged_in_bf16_are_rounded_and_written(tmp_path: Path) -> None:
    method = MethodConfig(name="lora", rank=4, alpha=8, dropout=0.0, targets="all")
    model = extend(load_dense(save_model(tmp_path / "dense"), torch.bfloat16), method, seed=1)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.05)
    ids = np.arange(48).reshape(2, 24)
    plan = ExpertPlan.dense(4, old=["en"], new=["el"])
    said = export(model, plan, tmp_path / "dense", tmp_path / "exported", torch.bfloat16, ids)
    assert 1e-4 < said.difference < 0.2

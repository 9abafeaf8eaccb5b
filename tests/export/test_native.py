"""Mixtures as architectures of transformers, loaded without code of ours. Run: pytest tests/export/test_native.py"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data_prep.extension import NewTokens
from pipeline.export.export import Exported, export
from pipeline.export.native.choose import AUTO, FORMS, choose_form
from pipeline.export.native.ernie import Ernie
from pipeline.export.native.form import NativeForm
from pipeline.export.native.mixture import ROPE_TYPES, Mixture
from pipeline.export.tensors import Planned
from pipeline.method.new_tokens import ExtendedTokenizer, add_new_rows
from pipeline.model.backbone import moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings, router
from pipeline.model.new_rows import new_rows
from pipeline.run.exporting import NATIVE
from tests.export.client import cached
from tests.export.test_folder import FIRST, SECOND, mixture
from tests.helpers.tiny import FFN, HIDDEN

IDS = torch.randint(1, 290, (3, 24), generator=torch.Generator().manual_seed(1))


def plan_of(counts: list[int], classifier_layers: list[int] | None = None) -> ExpertPlan:
    return ExpertPlan.first_expansion(
        counts, old=["en"], new=["el"], top_k=2, classifier_layers=classifier_layers or []
    )


ONE, DENSE_OR_THREE = plan_of([3, 3, 3, 3]), plan_of([1, 3, 3, 1])
PLAIN_SECOND = FIRST.expand([1, 2, 0, 1], languages=["hu"], classifier_layers=[])
LATE_CLASSIFIER = FIRST.expand([1, 2, 0, 1], languages=["hu"], classifier_layers=[1])  # where layer 1 was dense
LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
CASES = {
    "llama, one count": ("llama", ONE, "mixtral", {}),
    "mistral, one count": ("mistral", ONE, "mixtral", {}),
    "mistral, one count, a window": ("mistral", ONE, "mixtral", {"sliding_window": 8}),
    "qwen2, one count": ("qwen2", ONE, "qwen2_moe", {}),
    "llama, some dense": ("llama", DENSE_OR_THREE, "qwen2_moe", {"tie_word_embeddings": True}),
    "mistral, some dense": ("mistral", DENSE_OR_THREE, "qwen2_moe", {}),
    "qwen3, some dense": ("qwen3", DENSE_OR_THREE, "qwen3_moe", {}),
    "qwen3, one count, biases": ("qwen3", ONE, "qwen3_moe", {"attention_bias": True}),
    "qwen3, one count, a window": (
        "qwen3", ONE, "qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "llama, unequal": ("llama", FIRST, "ernie4_5_moe", {}),
    "mistral, unequal": ("mistral", FIRST, "ernie4_5_moe", {}),
    "qwen2, unequal": ("qwen2", FIRST, "ernie4_5_moe", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", ONE, "ernie4_5_moe", {"attention_bias": True}),
    "llama, other heads": ("llama", FIRST, "ernie4_5_moe", {"head_dim": 16}),
    "llama, one count, classifiers": ("llama", plan_of([3, 3, 3, 3], [0, 2]), "ernie4_5_moe", {}),
    "llama, two rounds": ("llama", PLAIN_SECOND, "ernie4_5_moe", {}),
    "qwen2, two rounds, three classes": ("qwen2", LATE_CLASSIFIER, "ernie4_5_moe", {}),
    **{
        f"llama, {kind}": ("llama", FIRST, "ernie4_5_moe", {"rope_parameters": {"rope_type": kind, **LONG, **more}})
        for kind, more in ROPES.items()
    },
}  # fmt: skip


QUICK = ("llama, one count", "mistral, one count, a window", "qwen2, one count", "qwen3, some dense", "qwen2, unequal",
         "llama with biases", "llama, other heads", "llama, two rounds", "qwen2, two rounds, three classes",
         "llama, yarn")  # fmt: skip
PARAMETERS = [pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
              for name, case in CASES.items()]  # fmt: skip


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def written(model: Any, plan: ExpertPlan, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[str, Exported]:
    """The name of the form that is chosen, and what its export says."""
    form = choose_form(AUTO, Mixture(model, plan))
    ids = np.asarray(IDS)
    return form.name, export(model, plan, folder / "dense", folder / "native", dtype, ids, form=form)


def loaded(folder: Path, **options: Any) -> Any:
    """The folder as transformers loads it, which finds all that it looks for and nothing more."""
    model, found = AutoModelForCausalLM.from_pretrained(folder / "native", output_loading_info=True, **options)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(("family", "plan", "name", "options"), PARAMETERS)
def test_transformers_computes_the_logits_of_training_without_code_of_ours_and_with_a_cache_too(
    tmp_path: Path, family: str, plan: ExpertPlan, name: str, options: dict[str, Any]
) -> None:
    model = mixture(tmp_path / "dense", family, plan, **options)
    with collect_routings(model) as routings:
        expected = logits_of(model)
    classes = [router.classify(one.class_logits_TC) for one in routings if one.class_logits_TC is not None]
    for found in classes:
        assert found.unique().tolist() == list(range(plan.num_groups)), "tokens of every group"
    assert bool(classes) == bool(plan.classifier_layers)
    chosen, said = written(model, plan, tmp_path)
    assert chosen == name
    assert said.difference < 1e-5 * max(1.0, said.largest) and said.rounded_difference is None
    native = loaded(tmp_path)
    assert native.config.model_type == name
    assert not list((tmp_path / "native").glob("*.py"))
    torch.testing.assert_close(logits_of(native), expected, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in native.parameters()) == said.parameters
    if "dynamic" not in str(options) and "longrope" not in str(options):  # whose angles depend on the length
        assert cached(native, IDS) < 1e-4
    prompt = IDS[:, :8]
    greedy = [native.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=c)
              for c in (False, True)]  # fmt: skip
    assert torch.equal(*greedy)


def test_every_form_is_chosen_in_some_case_and_named_on_the_command_line() -> None:
    names = [form.name for form in FORMS]
    assert set(names) == {name for _, _, name, _ in CASES.values()}
    assert set(ROPES) == set(ROPE_TYPES), "all kinds of positions that are not refused are compared"
    assert tuple(NATIVE) == (AUTO, *names)


def test_what_ernie_adds_is_counted(tmp_path: Path) -> None:
    """Counts 3, 1, 4 and 2 with classifiers on layers 0 and 2: 5 experts in each layer."""
    own = sum(parameter.numel() for parameter in mixture(tmp_path / "dense", "llama", FIRST).parameters())
    _, said = written(mixture(tmp_path / "dense", "llama", FIRST), FIRST, tmp_path)
    experts, rows = 4 * 5 - 10, 4 * 5 - (3 + 4 + 2) - 2 * 2
    assert said.added == experts * 3 * HIDDEN * FFN + rows * HIDDEN + 4 * 5
    assert said.parameters == own + said.added


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_new_tokens_are_in_it(tmp_path: Path, family: str) -> None:
    model = mixture(tmp_path / "dense", family, FIRST)
    add_new_rows(model, ExtendedTokenizer(tmp_path, "x", NewTokens(300, ((5, 6), (7, 8, 9)))))
    for rows in new_rows(model):
        rows.data += 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    ids = IDS.clone()
    ids[:, :2] = torch.tensor([300, 301])
    expected = logits_of(model, ids)
    name, _ = written(model, FIRST, tmp_path)
    native = loaded(tmp_path)
    assert name == "ernie4_5_moe" and native.config.vocab_size == 302
    torch.testing.assert_close(logits_of(native, ids), expected, rtol=1e-4, atol=1e-4)


def test_selection_biases_are_said_where_no_layer_needs_copies(tmp_path: Path) -> None:
    model = mixture(tmp_path / "dense", "llama", ONE, biases=True)
    expected = logits_of(model)
    for layer in moe_layers(model):
        layer.router.selection_bias, kept = torch.zeros(3), layer.router.selection_bias
        assert (logits_of(model) - expected).abs().max() > 1e-2, "they choose experts"
        layer.router.selection_bias = kept
    name, _ = written(model, ONE, tmp_path)
    assert name == "ernie4_5_moe"
    torch.testing.assert_close(logits_of(loaded(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_has_learned_nothing_counts_all_tokens_as_new(tmp_path: Path) -> None:
    model = mixture(tmp_path / "dense", "llama", FIRST)
    for layer in moe_layers(model):
        if layer.router.classifier is not None:
            layer.router.classifier.weight.data.zero_()
    expected = logits_of(model)
    written(model, FIRST, tmp_path)
    torch.testing.assert_close(logits_of(loaded(tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "plan"), [("llama", ONE), ("qwen2", FIRST)], ids=["mixtral", "ernie"])
def test_in_bf16_files_keep_routers_in_fp32_and_what_rounding_them_does_is_measured(
    tmp_path: Path, family: str, plan: ExpertPlan
) -> None:
    model = mixture(tmp_path / "dense", family, plan)
    routers = {id(parameter) for layer in moe_layers(model) for parameter in layer.router.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.bfloat16()
    name, said = written(model, plan, tmp_path, torch.bfloat16)
    assert said.difference < 1e-5 * max(1.0, said.largest)
    (file,) = (tmp_path / "native").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        kinds = {key: tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
    assert [kind for key, kind in kinds.items() if key.endswith("gate.weight")] == [torch.float32] * 4
    assert kinds["model.embed_tokens.weight"] == torch.bfloat16
    native = loaded(tmp_path)
    if name == "mixtral":
        assert native.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
        assert said.rounded_difference is not None and said.rounded_difference > said.difference
    else:
        assert native.model.layers[0].mlp.gate.weight.dtype == torch.float32
        assert said.rounded_difference is None


REFUSED: dict[str, tuple[str, str, ExpertPlan, dict[str, Any], str]] = {
    "gemma": (AUTO, "gemma", ONE, {}, "no mixture of experts in transformers computes layers as gemma does"),
    "gemma2": (AUTO, "gemma2", FIRST, {}, "no mixture of experts in transformers computes layers as gemma2 does"),
    "unequal qwen3": (
        AUTO, "qwen3", FIRST, {},
        "no architecture says this mixture exactly (qwen3_moe: all its layers with a router have as many experts, and "
        "these have 1 to 4)",
    ),
    "a class with some experts": (
        AUTO, "llama", SECOND, {},
        "ernie4_5_moe: its routers can send a class of tokens to expert 0 alone, but layer 0's classifier gives those "
        "of round 1 the first 3 experts",
    ),
    "whole sequences": (
        AUTO, "llama", FIRST.model_copy(update={"classifier": "sequence"}), {}, "it does not classify sequences",
    ),
    "biases and unequal counts": (AUTO, "llama", plan_of([3, 1, 4, 2]), {"biases": True}, "selection biases, by"),
    "a window": (AUTO, "mistral", FIRST, {"sliding_window": 8}, "ernie4_5_moe: its attention has no sliding window"),
    "windows of some layers": (
        AUTO, "qwen3", ONE, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "here some have one",
    ),
    "positions": (
        AUTO, "llama", FIRST, {"rope_parameters": {"rope_type": "proportional", **LONG}},
        "its positions of the rope_type proportional have not been compared",
    ),
    "mixtral, unequal": ("mixtral", "llama", FIRST, {}, "as many experts in every layer, and these have 1 to 4"),
    "mixtral, classifiers": ("mixtral", "llama", plan_of([3] * 4, [1]), {}, "no classifiers, and layer 1 has one"),
    "mixtral, biases": ("mixtral", "llama", ONE, {"attention_bias": True}, "its attention has no biases"),
    "mixtral, qwen2": ("mixtral", "qwen2", ONE, {}, "it does not compute layers as qwen2 does"),
    "qwen2_moe, a bias": ("qwen2_moe", "llama", ONE, {"attention_bias": True}, "attention's output has no bias"),
    "qwen2_moe, a window": ("qwen2_moe", "mistral", ONE, {"sliding_window": 8}, "knows sliding windows"),
    "qwen3_moe, llama": ("qwen3_moe", "llama", ONE, {}, "it does not compute layers as llama does"),
    "ernie4_5_moe, qwen3": ("ernie4_5_moe", "qwen3", ONE, {}, "it does not compute layers as qwen3 does"),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "family", "plan", "options", "line"), REFUSED.values(), ids=REFUSED)
def test_what_an_architecture_can_t_say_is_refused_in_one_line(
    tmp_path: Path, wanted: str, family: str, plan: ExpertPlan, options: dict[str, Any], line: str
) -> None:
    model = mixture(tmp_path / "dense", family, plan, **options)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        choose_form(wanted, Mixture(model, plan))
    assert "\n" not in str(caught.value) and "leave --native out" in str(caught.value)


class WithoutInterleaving(Ernie):
    """Ernie with queries and keys in Llama's order."""

    def _tensors(self, mixture: Mixture, dtype: torch.dtype) -> Iterator[tuple[str, Planned]]:
        own = dict(NativeForm._tensors(self, mixture, dtype))
        for name, planned in super()._tensors(mixture, dtype):
            yield name, own[name] if "q_proj" in name else planned


def test_a_folder_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    model = mixture(tmp_path / "dense", "llama", FIRST)
    with pytest.raises(UserError, match="as ernie4_5_moe the folder's logits would differ") as caught:
        export(model, FIRST, tmp_path / "dense", tmp_path / "native", torch.float32, np.asarray(IDS),
               form=WithoutInterleaving())  # fmt: skip
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]

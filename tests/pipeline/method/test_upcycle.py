"""Upcycling keeps the model's function, for every family. Run: pytest tests/pipeline/method/test_upcycle.py"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, OlmoConfig, OlmoForCausalLM

from common.errors import UserError
from common.files import read_json
from pipeline.checkpoint.tensors import expert_file, load_tensors, main_file
from pipeline.checkpoint.verify import damaged_files
from pipeline.method.expert_init import ExpertInit, drop_upcycled, expert_generator, with_noise
from pipeline.method.parity import logits_in_fp32
from pipeline.method.upcycle import load_upcycled, upcycle
from pipeline.model.backbone import load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe.experts import fused_weights
from tests.helpers.tiny import FAMILIES, FFN, VOCAB_SIZE, save_model, save_tokenizer

SAMPLES = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 40))


def plan_of(counts: list[int], classifier_layers: tuple[int, ...] = ()) -> ExpertPlan:
    return ExpertPlan.first_expansion(
        counts, old=["en"], new=["el"], top_k=2, classifier_layers=list(classifier_layers)
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(SAMPLES), use_cache=False).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_step_0_logits_equal_the_dense_models(family: str, tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense", family)
    plan = plan_of([3, 2, 1, 4])
    manifest = upcycle(dense, plan, SAMPLES, tmp_path / "upcycled", seed=1, model_hash="x")
    expected = logits(load_dense(dense, torch.float32))
    model = load_upcycled(tmp_path / "upcycled", plan, torch.float32)
    assert [layer.num_experts for layer in moe_layers(model)] == [3, 2, 4]
    assert float(expected.std()) > 0.1  # a model that says something
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert manifest.parity["holds"]
    assert manifest.parity["max_abs_logit_difference"] < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_receipt_of_a_bf16_model_is_in_fp32_layer_by_layer(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "fp32", family)
    load_dense(tmp_path / "fp32", torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = plan_of([3, 2, 1, 4])
    manifest = upcycle(tmp_path / "dense", plan, SAMPLES, tmp_path / "upcycled", seed=1, model_hash="x")
    assert manifest.dtype == "bfloat16" and manifest.parity["max_abs_logit_difference"] < 1e-5
    whole = load_dense(tmp_path / "dense", torch.bfloat16).float()
    with torch.no_grad():
        piecewise = logits_in_fp32(load_dense(tmp_path / "dense", torch.bfloat16), torch.from_numpy(SAMPLES))
    torch.testing.assert_close(piecewise, logits(whole), rtol=0, atol=0)
    assert manifest.parity["max_abs_logit"] == float(piecewise.abs().max())


MEMORY_OF_A_RECEIPT = """
import sys, threading, time
from pathlib import Path
import numpy as np
import torch
from pipeline.method.expert_init import ExpertInit, drop_upcycled, expert_generator, with_noise
from pipeline.method.parity import measure_parity
from pipeline.model.expert_plan import ExpertPlan

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))

def watch():
    while not done.wait(0.001):
        peaks.append(anonymous())

folder = Path(sys.argv[1])
arguments = folder / "dense", folder / "upcycled", ExpertPlan.load(folder / "plan.json"), np.zeros((1, 8), int)
measure_parity(*arguments, torch.bfloat16)  # imports and threads
before, peaks, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
measure_parity(*arguments, torch.bfloat16)
done.set()
thread.join()
print(max(peaks) - before)
"""


def test_the_receipt_takes_the_memory_of_the_dense_model_and_of_a_layer(tmp_path: Path) -> None:
    hidden, intermediate, layers, new = 256, 4096, 12, 5
    save_model(tmp_path / "fp32", num_layers=layers, hidden_size=hidden, intermediate_size=intermediate)
    load_dense(tmp_path / "fp32", torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = plan_of([1 + new] * layers)
    plan.save(tmp_path / "plan.json")
    upcycle(tmp_path / "dense", plan, SAMPLES, tmp_path / "upcycled", seed=1, model_hash="x")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_A_RECEIPT, str(tmp_path)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True,
    )  # fmt: skip
    mlp = 3 * hidden * intermediate
    dense_bf16, layer_fp32 = 2 * mlp * layers, 4 * mlp * (1 + new)
    both_in_fp32 = 2 * dense_bf16 + 4 * mlp * layers * new
    assert float(done.stdout) < 1.25 * (dense_bf16 + layer_fp32) < both_in_fp32 / 4


def test_random_experts_are_no_copies_and_the_receipt_says_by_how_much(tmp_path: Path) -> None:
    dense, plan = save_model(tmp_path / "dense"), plan_of([3, 2, 1, 4])
    manifest = upcycle(dense, plan, SAMPLES, tmp_path / "upcycled", seed=1, model_hash="x", init=ExpertInit("random"))
    assert not manifest.parity["holds"] and manifest.parity["max_abs_logit_difference"] > 0.01
    model = load_upcycled(tmp_path / "upcycled", plan, torch.float32)
    first, *others = [p for name, p in model.named_parameters() if "deepspeed_experts" in name and "gate_up" in name]
    assert all(not torch.equal(first, other) for other in others)
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.1)  # as the model's configuration initialises


EXPERT_WEIGHTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def an_mlp(hidden: int = 64, intermediate: int = 400) -> dict[str, torch.Tensor]:
    """A bf16 MLP's state_dict whose matrices have means and deviations of their own, with biases."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    moments = [(0.5, 0.1), (-0.3, 0.2), (0.1, 0.4)]
    mlp = {}
    for name, shape, (mean, deviation) in zip(EXPERT_WEIGHTS, shapes, moments, strict=True):
        mlp[name] = torch.empty(shape).normal_(mean, deviation, generator=generator).bfloat16()
        mlp[name.replace("weight", "bias")] = torch.randn(shape[0], generator=generator).bfloat16()
    return mlp


def test_dropping_draws_a_share_of_the_intermediate_dimensions_anew_with_the_moments_of_what_it_replaces() -> None:
    mlp = an_mlp()
    dropped = drop_upcycled(mlp, 0.3, expert_generator(7, 0, 1))
    assert dropped.keys() == mlp.keys()
    found = []
    for name, axis in zip(EXPERT_WEIGHTS, (1, 1, 0), strict=True):
        assert dropped[name].dtype == torch.bfloat16
        assert torch.equal(dropped[name.replace("weight", "bias")], mlp[name.replace("weight", "bias")])
        changed = (dropped[name] != mlp[name]).any(axis)
        before, now = (w[name].float().index_select(1 - axis, changed.nonzero()[:, 0]) for w in (mlp, dropped))
        assert (before != now).float().mean() > 0.9  # all of such a dimension
        assert float(now.mean()) == pytest.approx(float(before.mean()), abs=0.02)
        assert float(now.std()) == pytest.approx(float(before.std()), rel=0.05)
        found.append(changed.nonzero()[:, 0].tolist())
    assert found[0] == found[1] == found[2] and len(found[0]) == 120


def test_dropping_all_keeps_no_weight_and_dropping_less_than_a_dimension_keeps_all() -> None:
    mlp = an_mlp()
    all_of_it, nothing = (drop_upcycled(mlp, ratio, expert_generator(7, 0, 1)) for ratio in (1.0, 0.002))
    for name in EXPERT_WEIGHTS:
        assert (all_of_it[name] != mlp[name]).float().mean() > 0.9
        assert torch.equal(nothing[name], mlp[name])


def test_noise_is_relative_to_each_matrix_and_leaves_biases() -> None:
    mlp = {name: tensor.float() for name, tensor in an_mlp().items()}
    noisy = with_noise(mlp, 0.25, expert_generator(7, 0, 1))
    for name in EXPERT_WEIGHTS:
        added = noisy[name] - mlp[name]
        assert float(added.std()) == pytest.approx(0.25 * float(mlp[name].std()), rel=0.03)
        assert abs(float(added.mean())) < 0.01 * float(mlp[name].std())
        assert torch.equal(noisy[name.replace("weight", "bias")], mlp[name.replace("weight", "bias")])


@pytest.mark.parametrize("init", [ExpertInit("drop", drop_ratio=0.25), ExpertInit(noise=0.1)], ids=["drop", "noise"])
def test_experts_that_differ_from_their_mlp_have_files_and_the_receipt_says_by_how_much(
    init: ExpertInit, tmp_path: Path
) -> None:
    dense, plan = save_model(tmp_path / "dense"), plan_of([3, 2, 1, 4])
    made = [
        upcycle(dense, plan, SAMPLES, tmp_path / name, seed=seed, model_hash="x", init=init)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    assert all(manifest.holds_experts and not manifest.parity["holds"] for manifest in made)
    assert made[0].parity["max_abs_logit_difference"] > 0.01
    assert [manifest.parity == made[0].parity for manifest in made] == [True, True, False]
    model = load_upcycled(tmp_path / "first", plan, torch.float32)
    found = (logits(model) - logits(load_dense(dense, torch.float32))).abs().max()
    assert float(found) == pytest.approx(made[0].parity["max_abs_logit_difference"], rel=1e-4)
    layer = moe_layers(model)[2]
    copy = fused_weights(layer.base_mlp.state_dict())["gate_up_proj"]
    rows = [(expert.gate_up_proj != copy).any(1) for expert in layer.local_experts.experts]
    assert not torch.equal(layer.local_experts.experts[0].gate_up_proj, layer.local_experts.experts[1].gate_up_proj)
    if init.kind == "drop":
        assert [int(row.sum()) for row in rows] == [2 * FFN // 4] * 3
        assert not torch.equal(rows[0], rows[1])  # other dimensions for each expert
    again = load_upcycled(tmp_path / "again", plan, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_routers_do_not_depend_on_what_experts_begin_as(tmp_path: Path) -> None:
    dense, plan = save_model(tmp_path / "dense"), plan_of([3, 2, 1, 4])
    routers = []
    for name, init in (("copy", ExpertInit()), ("drop", ExpertInit("drop"))):
        upcycle(dense, plan, SAMPLES, tmp_path / name, seed=1, model_hash="x", init=init)
        model = load_upcycled(tmp_path / name, plan, torch.float32)
        routers.append([layer.router.wg.weight for layer in moe_layers(model)])
    assert all(torch.equal(p, q) for p, q in zip(*routers, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_equal_experts_of_either_bias_or_activation_act_as_the_mlp(family: str, tmp_path: Path) -> None:
    options = {"mlp_bias": True} if family == "llama" else {}
    dense = save_model(tmp_path / "dense", family, **options)
    plan = plan_of([2, 2, 2, 2])
    upcycle(dense, plan, SAMPLES, tmp_path / "upcycled", seed=1, model_hash="x")
    model = load_upcycled(tmp_path / "upcycled", plan, torch.float32)
    layer = moe_layers(model)[0]
    x = torch.randn(7, 32)
    torch.testing.assert_close(layer.local_experts.experts[0](x), layer.base_mlp(x), rtol=1e-5, atol=1e-5)


def test_another_model_with_gated_mlps_works_too(tmp_path: Path) -> None:
    config = OlmoConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    save_tokenizer(tmp_path / "olmo")
    assert upcycle(tmp_path / "olmo", plan_of([2, 3]), SAMPLES, tmp_path / "out", seed=1, model_hash="x").parity[
        "holds"
    ]


@pytest.mark.parametrize(("config", "model"), [
    (GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4), GPT2LMHeadModel),
    (MixtralConfig(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2, num_local_experts=2), MixtralForCausalLM),
])  # fmt: skip
def test_a_model_without_gated_mlps_is_refused_in_one_line(config: Any, model: Any, tmp_path: Path) -> None:
    model(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="gate_proj") as caught:
        upcycle(tmp_path / "other", plan_of([2, 2]), SAMPLES, tmp_path / "out", seed=1, model_hash="x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_receipt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_model(tmp_path / "dense")
    from pipeline.method import parity as module

    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    real = module.fused_weights
    monkeypatch.setattr(module, "fused_weights", lambda mlp: {k: v * 1.01 for k, v in real(mlp).items()})
    with pytest.raises(UserError, match="logits differ"):
        upcycle(dense, plan_of([3, 2, 1, 4]), SAMPLES, tmp_path / "out", seed=1, model_hash="x")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_copies_are_not_written_and_load_as_if_they_were(family: str, tmp_path: Path) -> None:
    options = {"mlp_bias": True} if family == "llama" else {}
    dense, plan = save_model(tmp_path / "dense", family, **options), plan_of([3, 2, 1, 4])
    without = upcycle(dense, plan, SAMPLES, tmp_path / "without", seed=1, model_hash="x")
    written = upcycle(dense, plan, SAMPLES, tmp_path / "written", seed=1, model_hash="x", write_copies=True)
    assert (without.holds_experts, written.holds_experts) == (False, True)
    assert without.parity == written.parity
    assert [path.name for path in (tmp_path / "without" / "upcycled").iterdir()] == [main_file()]
    models = [load_upcycled(tmp_path / name, plan, torch.bfloat16) for name in ("without", "written")]
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_a_lost_file_of_an_expert_is_no_copy(tmp_path: Path) -> None:
    dense, plan = save_model(tmp_path / "dense"), plan_of([3, 2, 1, 4])
    upcycle(dense, plan, SAMPLES, tmp_path / "out", seed=1, model_hash="x", init=ExpertInit("random"))
    (tmp_path / "out" / "upcycled" / expert_file(1, 0)).unlink()
    with pytest.raises(UserError, match=r"layers\.1\..*deepspeed_experts\.0\..* 1 more are missing"):
        load_upcycled(tmp_path / "out", plan, torch.float32)


def test_the_checkpoint_is_native_and_its_manifest_says_where_it_is_from(tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense")
    plan = plan_of([3, 2, 1, 4])
    upcycle(dense, plan, SAMPLES, tmp_path / "out", seed=1, model_hash="abc", write_copies=True)
    folder = tmp_path / "out" / (tmp_path / "out" / "latest").read_text()
    main = load_tensors(folder / "mp_rank_00_model_states.pt")
    assert main["num_experts"] == [2, 1, 3]
    assert "lm_head.weight" in main["module"]
    assert not [name for name in main["module"] if "deepspeed_experts" in name]
    experts = {
        f"layer_{layer}_expert_{n}_mp_rank_00_model_states.pt" for layer, c in enumerate((2, 1, 3)) for n in range(c)
    }
    assert {p.name for p in folder.glob("layer_*")} == experts
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["model"] == "abc"
    assert manifest["plan"]["rounds"][1] == {"languages": ["el"], "num_new": [2, 1, 0, 3], "source": "expert 0"}
    assert set(manifest["files"]) == {f"upcycled/{name}" for name in experts | {"mp_rank_00_model_states.pt"}}
    assert damaged_files(tmp_path / "out") == []


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense", tie_word_embeddings=True)
    plan = plan_of([2, 2, 2, 2])
    upcycle(dense, plan, SAMPLES, tmp_path / "out", seed=1, model_hash="x")
    module = load_tensors(tmp_path / "out" / "upcycled" / main_file())["module"]
    assert "lm_head.weight" not in module
    model = load_upcycled(tmp_path / "out", plan, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight

"""The ready runs parse, and give the papers' plans. Run: pytest tests/launch/test_runs.py"""

import json
from itertools import combinations
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from common.errors import UserError
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.method.allocation import allocate, expert_plan
from pipeline.method.similarity import layer_similarity
from pipeline.method.stages import find_stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.run_folder import PLAN_FILE, RunFolder
from pipeline.training.ds_config import batch_shape, read_ds_config
from tests.launch.test_commands import ROOT

RUNS = ROOT / "launch" / "runs"
THEN = "qwen1.5-1.8b-g1-then-g2"
PUBLISHED = json.loads((ROOT / "tests" / "golden" / "llama3.2-3b-g1-similarity.json").read_text())
LLAMA = layer_similarity(
    PUBLISHED["pairs"],
    [f"{a}&{b}" for a, b in combinations(PUBLISHED["new"], 2)],
    [f"{a}&{b}" for a in PUBLISHED["new"] for b in PUBLISHED["old"]],
)


def plan_of(run: RunConfig, num_layers: int, similarity: list[float] | None) -> ExpertPlan:
    """The plan that allocation makes of a run's settings."""
    classifiers = run.experts.classifier_layers
    return ExpertPlan.first_expansion(
        allocate(run.experts, num_layers, similarity).counts,
        old=sorted(run.data.old), new=sorted(run.data.new), top_k=run.experts.top_k,
        classifier_layers=classifiers if isinstance(classifiers, list) else [],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def first_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work where the first rounds' runs have been planned: a run that expands one further needs its folder."""
    monkeypatch.chdir(tmp_path)
    RunFolder.create(load_run(RUNS / "quickstart.yaml"))
    run = load_run(RUNS / "qwen1.5-1.8b-g1.yaml")
    plan_of(run, 24, None).save(RunFolder.create(run) / PLAN_FILE)


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_run_parses_and_its_batches_divide_among_its_ranks(path: Path) -> None:
    run = load_run(path)
    assert run.name == path.stem
    for number in (1, 2):
        job = run.cluster.job(f"stage{number}")
        ep_size = 1 if run.parallel.ep_size == "auto" else run.parallel.ep_size
        world_size = max(job.world_size, ep_size)
        shape = batch_shape(run, run.stage(number), world_size, "cuda")
        assert shape.micro_batch * shape.accumulation * world_size == run.stage(number).global_batch_size
        assert job.world_size == 1 or job.world_size % ep_size == 0
    assert run.cluster.job("tokenize").gpus_per_node == 0


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_run_finds_its_deepspeed_config_from_any_folder(tmp_path: Path, path: Path) -> None:
    run = load_run(path)
    assert run.ds_config_file == ROOT / "ds_configs" / "bf16_zero1.json"
    assert read_ds_config(run.ds_config_file)["bf16"]["enabled"]
    own = tmp_path / run.deepspeed
    own.parent.mkdir()
    own.write_text("{}")
    assert run.ds_config_file.resolve() == own  # a file of the user's comes first


def test_a_deepspeed_config_that_is_nowhere_is_named_as_the_run_names_it() -> None:
    run = load_run(RUNS / "my-languages.yaml", ["deepspeed=mine/zero.json"])
    with pytest.raises(UserError, match="deepspeed: mine/zero.json does not exist"):
        read_ds_config(run.ds_config_file)


# What the papers' scripts say: the reference's lists of experts, batches of stage 2, and the Trainer's defaults.
PLANS = {
    "qwen1.5-1.8b-g1": "5 4 3 5 4 3 2 3 3 2 2 2 2 2 2 2 2 3 3 4 4 4 3 3",
    "qwen1.5-1.8b-g2": "5 5 4 5 4 3 2 3 3 3 2 2 2 2 2 3 3 3 3 3 3 3 2 2",
}
PAPERS = ["llama3.2-3b-g1", "moe-lpr-qwen1.5-1.8b", *PLANS]


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_runs_have_the_schedule_of_their_scripts(name: str) -> None:
    run = load_run(RUNS / f"{name}.yaml")
    for number in (1, 2):
        stage = run.stage(number)
        assert (stage.lr, stage.betas, stage.eps, stage.weight_decay) == (5e-5, (0.9, 0.999), 1e-8, 0.0)
        assert (stage.warmup_ratio, stage.min_lr_ratio, stage.gradient_clipping) == (0.0, 0.0, 1.0)
    assert (run.stage1.global_batch_size, run.stage1.sequence_length) == (512, 1024)
    assert run.data.bos == "none"
    assert {entry.max_documents for entry in run.data.old.values()} == {50_000}
    assert set(run.data.old) == {"en", "es", "zh"}


@pytest.mark.parametrize(
    ("name", "num_layers", "total", "languages", "batch"),
    [
        ("qwen1.5-1.8b-g1", 24, 72, {"el", "hu", "tr"}, 768),
        ("qwen1.5-1.8b-g2", 24, 72, {"bn", "hi", "ne"}, 768),
        ("llama3.2-3b-g1", 28, 84, {"el", "hu", "tr"}, 640),
    ],
)
def test_layermoes_runs_are_the_published_ones(
    name: str, num_layers: int, total: int, languages: set[str], batch: int
) -> None:
    run = load_run(RUNS / f"{name}.yaml")
    plan = plan_of(run, num_layers, LLAMA if num_layers == 28 else None)
    assert sum(plan.counts) == total
    if name in PLANS:
        assert list(plan.counts) == [int(count) for count in PLANS[name].split()]
        assert plan.classifier_layers == (5, 6, 10, 11, 12, 13, 23)
    assert set(run.data.new) == languages
    assert run.stage1.tokens == 6e9
    assert (run.similarity.tokens, run.similarity.windows, run.similarity.sequence_length) == (
        10**5,
        "documents",
        10**4,
    )
    assert run.stage2 is not None
    assert (run.stage2.global_batch_size, run.stage2.sequence_length) == (batch, 512)
    assert run.stage2.tokens * run.stage2.old_share == pytest.approx(0.138e9, rel=1e-3)


def test_group_2_after_group_1_has_120_experts_and_the_languages_of_both() -> None:
    run = load_run(RUNS / f"{THEN}.yaml")
    similarity = LLAMA[:24]  # of another model: which layers get more is not what counts here
    plan = expert_plan(run, allocate(run.experts, 24, similarity).counts, similarity)
    before = [int(count) for count in PLANS["qwen1.5-1.8b-g1"].split()]
    assert sum(plan.counts) == 120 and sum(before) == 72
    assert all(count >= old for count, old in zip(plan.counts, before, strict=True))
    assert [one.languages for one in plan.rounds] == [("en", "es", "zh"), ("el", "hu", "tr"), ("bn", "hi", "ne")]
    assert plan.classifier_layers == (5, 6, 10, 11, 12, 23)
    assert (run.model.path, set(run.data.old)) == ("Qwen/Qwen1.5-1.8B", {"en", "es", "zh", "el", "hu", "tr"})
    assert run.stage2 is not None
    assert (run.stage1.tokens, run.stage2.global_batch_size, run.stage2.sequence_length) == (6e9, 768, 512)


def test_mola_gives_its_quarters() -> None:
    changes = ["experts.allocation=mola", "experts.counts=null"]
    run = load_run(RUNS / "qwen1.5-1.8b-g1.yaml", changes)
    assert plan_of(run, 24, None).counts == (2,) * 6 + (4,) * 6 + (6,) * 6 + (8,) * 6


def test_llamas_plan_is_the_published_one() -> None:
    plan = plan_of(load_run(RUNS / "llama3.2-3b-g1.yaml"), 28, LLAMA)
    assert list(plan.counts) == PUBLISHED["experts_per_layer_including_the_original"]


def test_moe_lprs_run_gives_six_experts_a_layer() -> None:
    run = load_run(RUNS / "moe-lpr-qwen1.5-1.8b.yaml")
    plan = plan_of(run, 24, None)
    assert plan.counts == (6,) * 24
    assert plan.classifier_layers == ()
    assert run.stage1.tokens == 24e9
    assert run.stage2 is not None
    assert (run.stage2.global_batch_size, run.stage2.sequence_length) == (512, 512)
    assert set(run.data.watch) == {"fr", "pt"}


def test_moe_lprs_ablation_of_one_stage_can_be_run() -> None:
    changes = ["stage2=null", "stage1.old_share=0.01", "stage1.lpr_weight=0.1", "experts.init=random"]
    run = load_run(RUNS / "moe-lpr-qwen1.5-1.8b.yaml", changes)
    assert run.stage_numbers == [1]
    assert find_stage(run, 1).shares() == {"old": 0.01, "new": 0.99}


CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "qwen": Qwen2Config(vocab_size=151936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24,
                        num_attention_heads=16, num_key_value_heads=16),
}  # fmt: skip


@pytest.mark.slow  # layers of the real size are run once to see what they keep
@pytest.mark.parametrize("name", PAPERS)
def test_estimate_of_a_papers_run_needs_the_models_config_alone_and_finds_that_ep_size_1_fits(
    name: str, tmp_path: Path
) -> None:
    CONFIGS[next(family for family in CONFIGS if family in name)].save_pretrained(tmp_path)
    run = load_run(RUNS / f"{name}.yaml", [f"model.path={tmp_path}", f"output_dir={tmp_path}"])
    estimate = Estimate(run, 8, Device.named("h100"), num_new=56)
    assert estimate.dims.ep_size == 1
    assert "smallest ep_size that fits 8 ranks" in estimate.text(None)

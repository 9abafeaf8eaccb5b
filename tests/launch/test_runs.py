"""The ready runs parse, and give the papers' plans. Run: pytest tests/launch/test_runs.py"""

import json
from itertools import combinations
from pathlib import Path

import pytest

from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.method.allocation import allocate
from pipeline.method.similarity import layer_similarity
from pipeline.model.expert_plan import ExpertPlan
from pipeline.training.ds_config import batch_shape
from tests.launch.test_commands import ROOT

RUNS = ROOT / "launch" / "runs"
PUBLISHED = json.loads((ROOT / "tests" / "golden" / "llama3.2-3b-g1-similarity.json").read_text())
LLAMA = layer_similarity(
    PUBLISHED["pairs"],
    [f"{a}&{b}" for a, b in combinations(PUBLISHED["new"], 2)],
    [f"{a}&{b}" for a in PUBLISHED["new"] for b in PUBLISHED["old"]],
)
# Of 24 layers, low at both ends: the papers publish no similarities of Qwen1.5-1.8B.
QWEN = [0.2 + 0.01 * min(layer, 23 - layer) + 0.003 * layer for layer in range(24)]


def plan_of(run: RunConfig, num_layers: int, similarity: list[float] | None) -> ExpertPlan:
    """The plan that allocation makes of a run's settings."""
    classifiers = run.experts.classifier_layers
    return ExpertPlan.first_expansion(
        allocate(run.experts, num_layers, similarity).counts,
        old=sorted(run.data.old), new=sorted(run.data.new), top_k=run.experts.top_k,
        classifier_layers=classifiers if isinstance(classifiers, list) else [],
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_run_parses_and_its_batches_divide_among_its_ranks(path: Path) -> None:
    run = load_run(path)
    assert run.name == path.stem
    for number in (1, 2):
        job = run.cluster.job(f"stage{number}")
        world_size = max(job.world_size, run.parallel.ep_size)
        shape = batch_shape(run, run.stage(number), world_size, "cuda")
        assert shape.micro_batch * shape.accumulation * world_size == run.stage(number).global_batch_size
        assert job.world_size == 1 or job.world_size % run.parallel.ep_size == 0
    assert run.cluster.job("tokenize").gpus_per_node == 0


@pytest.mark.parametrize(
    ("name", "num_layers", "total", "languages"),
    [
        ("qwen1.5-1.8b-g1", 24, 72, {"el", "hu", "tr"}),
        ("qwen1.5-1.8b-g2", 24, 72, {"bn", "hi", "ne"}),
        ("llama3.2-3b-g1", 28, 84, {"el", "hu", "tr"}),
    ],
)
def test_layermoes_runs_give_its_numbers_of_experts(
    name: str, num_layers: int, total: int, languages: set[str]
) -> None:
    run = load_run(RUNS / f"{name}.yaml")
    similarity = LLAMA if num_layers == 28 else QWEN
    plan = plan_of(run, num_layers, similarity)
    assert sum(plan.counts) == total
    assert set(run.data.new) == languages
    assert set(run.data.old) == {"en", "es", "zh"}
    assert (run.stage1.tokens, run.stage1.global_batch_size, run.stage1.sequence_length) == (6e9, 512, 1024)
    assert run.stage2 is not None
    assert (run.stage2.global_batch_size, run.stage2.sequence_length) == (768, 512)
    assert run.stage1.lr == run.stage2.lr == 5e-5
    plan.placement(run.parallel.ep_size)


def test_llamas_plan_is_the_published_one() -> None:
    plan = plan_of(load_run(RUNS / "llama3.2-3b-g1.yaml"), 28, LLAMA)
    assert list(plan.counts) == PUBLISHED["experts_per_layer_including_the_original"]


def test_qwens_group_1_has_the_published_classifiers() -> None:
    plan = plan_of(load_run(RUNS / "qwen1.5-1.8b-g1.yaml"), 24, QWEN)
    assert plan.classifier_layers == (5, 6, 10, 11, 12, 13, 23)


def test_moe_lprs_run_gives_six_experts_a_layer() -> None:
    run = load_run(RUNS / "moe-lpr-qwen1.5-1.8b.yaml")
    plan = plan_of(run, 24, None)
    assert plan.counts == (6,) * 24
    assert plan.classifier_layers == ()
    assert run.stage1.tokens == 24e9
    assert run.stage2 is not None
    assert (run.stage2.global_batch_size, run.stage2.sequence_length) == (512, 512)

"""A real run of the benchmark's sizes, upcycled in a folder, and its stage 1 as pipeline/training trains it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.step_blocks import TOP_K
from benchmarks.step_models import Sizes
from common.settings import parse_settings
from data_prep.store import TokenStore
from pipeline.config.run import RunConfig
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.method.stages import find_stage
from pipeline.method.untrained import UntrainedMixture
from pipeline.method.upcycle import upcycle
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointIdentity
from pipeline.records.step_manifest import StepInputs
from pipeline.training.ds_config import batch_shape
from pipeline.training.engine import build_engine
from pipeline.training.inputs import StageInputs
from pipeline.training.mixture import Source
from pipeline.training.rank_log import RankLog
from pipeline.training.sample_order import SampleOrder
from pipeline.training.samples_ahead import Places, SamplesAhead
from pipeline.training.skipped_steps import SkippedSteps
from pipeline.training.state import TrainingState

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10_000  # more than are taken
SAMPLES_OF_TEXT = 1000


@dataclass(frozen=True)
class RandomTokens:
    """Token ids in memory, as a source of samples reads them."""

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop - 1``."""
        return self.ids[start:stop]


def run_config(sizes: Sizes, dtype: str, world_size: int, folder: Path, **of_stages: Any) -> RunConfig:
    """The settings: every layer has the same number of experts, one micro-step is a step, and none is skipped."""
    stage = {
        "tokens": STEPS * world_size * sizes.tokens,
        "sequence_length": sizes.sequence,
        "global_batch_size": world_size * sizes.samples,
        **of_stages,
    }
    tree = {
        "name": "benchmark",
        "output_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        "model": {"path": str(folder / "dense")},
        "data": {"old": {"old": {"path": "random"}}, "new": {"new": {"path": "random"}}},
        "experts": {"allocation": "explicit", "counts": [sizes.experts] * sizes.layers, "top_k": TOP_K},
        "stage1": stage,
        "stage2": stage,
        "bad_steps": {"norm_factor": None},
        "parallel": {"micro_batch_size": sizes.samples},
        "deepspeed": str(ROOT / "ds_configs" / f"{dtype}_zero1.json"),
        "log": {"tensorboard": False},
    }
    return parse_settings(RunConfig, tree, "the benchmark's run")


def expert_plan(sizes: Sizes) -> ExpertPlan:
    """The same number of experts in every layer."""
    counts = [sizes.experts] * sizes.layers
    return ExpertPlan.first_expansion(counts, old=["old"], new=["new"], top_k=TOP_K, classifier_layers=[])


def write_upcycled(sizes: Sizes, dtype: torch.dtype, folder: Path, device: str = "cpu") -> None:
    """Write a random dense model, made on a device, to ``dense``, and what it is upcycled to to ``upcycled``."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes.llama(), dtype=dtype)
    model.save_pretrained(folder / "dense")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    samples = np.random.default_rng(0).integers(sizes.vocab, size=(1, min(8, sizes.sequence)))
    upcycle(folder / "dense", expert_plan(sizes), samples, folder / "upcycled", seed=0, model_hash="random")


def start_stage1(sizes: Sizes, run: RunConfig, folder: Path, ep_size: int, ranks: Ranks) -> TrainingState:
    """Stage 1 before its first step: as TrainingState.start, but that its tokens are random."""
    stage, dims = find_stage(run, 1), ParallelDims(ranks.world_size, ep_size, ranks.rank)
    ids = np.random.default_rng(1).integers(sizes.vocab, size=SAMPLES_OF_TEXT * sizes.sequence + 1, dtype=np.int64)
    settings = stage.settings
    order = SampleOrder(
        [Source("new", RandomTokens(ids), 1.0, is_old=False, group=1)],
        sequence_length=settings.sequence_length,
        num_samples=settings.num_steps * settings.global_batch_size,
        seed=run.seed,
    )
    shape = batch_shape(run, settings, ranks.world_size, ranks.device.type)
    inputs = StageInputs(
        run=run,
        stage=stage,
        plan=expert_plan(sizes),
        store=cast(TokenStore, None),  # nothing reads it, as the order of samples is given
        untrained=UntrainedMixture(folder / "upcycled", expert_plan(sizes)),
        folder=folder / f"stage1-{ep_size}",
        identity=CheckpointIdentity(model="random", plan="", tokenizer=""),
        done_with=StepInputs(inputs={}, run={}),
        dims=dims,
    )
    engine = build_engine(inputs, shape)
    places = Places(settings.global_batch_size, shape.micro_batch, shape.accumulation, ranks.world_size, ranks.rank)
    samples = SamplesAhead(order, places, pin=ranks.device.type == "cuda")
    rank_log = RankLog(inputs.folder, ranks.rank, [], writes=False)
    return TrainingState(
        inputs, ranks, shape, order, samples, engine, SkippedSteps(run.bad_steps, engine), rank_log, ranks.hosts()
    )  # fmt: skip

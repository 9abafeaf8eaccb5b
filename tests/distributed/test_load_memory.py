"""What a node's memory holds while a stage's model is loaded, and while a model is scored.

Run: pytest tests/distributed/test_load_memory.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.checkpoint import weights
from pipeline.distributed.process_group import Ranks, forget_earlier_stages
from pipeline.evaluation.checkpoints import Scored, load_model
from pipeline.model.backbone import ONE_RANK
from pipeline.run.context import RunContext
from pipeline.training import engine
from pipeline.training.ds_config import read_ds_config
from tests.distributed.conftest import Pools
from tests.distributed.stages import stage_inputs
from tests.helpers.tiny import parse_run, prepared_run, run_tree, save_model

LAYERS, HIDDEN, FFN = 8, 1024, 4096
MLP = 3 * HIDDEN * FFN * torch.bfloat16.itemsize  # 25 MB
BASE = LAYERS * MLP  # attention and embeddings are a hundredth of it
SMAPS = Path("/proc/self/smaps_rollup")


def proportional_set_size() -> int:
    """Bytes of this process's memory; of pages that processes share, its part."""
    lines = SMAPS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def memory_while_loading(ranks: Ranks, tree: dict[str, Any], folder: Path) -> tuple[int, int]:
    """How far this rank's memory grows while stage 1's model is loaded: until all shared weights are read, and then.

    It is looked at whenever a tensor of the shared weights has been copied, before the experts are read, and at the
    end.
    """
    forget_earlier_stages(ranks.device)
    inputs = stage_inputs(tree, 1, folder, ranks)
    ds_config = read_ds_config(inputs.run.ds_config_file)
    shared_tensors, largest = weights._shared_tensors, [0]
    before = proportional_set_size()

    def looking(*arguments: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for entry in shared_tensors(*arguments, **options):
            yield entry
            largest[0] = max(largest[0], proportional_set_size() - before)

    with patch.object(weights, "_shared_tensors", looking):
        model = engine._load_model(inputs, ds_config)
    at_the_end = proportional_set_size() - before
    del model
    return largest[0], at_the_end


def prepare(folder: Path, *, distinct_experts: bool, **changes: Any) -> None:
    """A run of a model whose MLPs are nearly all of it, in bf16, done up to upcycling."""
    save_model(folder / "model", num_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=FFN)
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    prepared_run(folder, distinct_experts=distinct_experts, **changes)


@torch.inference_mode()
def memory_while_scoring(ranks: Ranks, tree: dict[str, Any]) -> int:
    """How far this rank's memory has grown when a model with all experts is ready and has computed something.

    All ranks look at the same time.
    """
    context = RunContext(parse_run(tree, "tiny.yaml"))
    scored = Scored("untrained", (), {}, untrained=context.untrained)
    before = proportional_set_size()
    model = load_model(scored, context.untrained, torch.bfloat16, ONE_RANK, torch.device("cpu"))
    model(input_ids=torch.arange(64).view(1, 64), use_cache=False)
    ranks.sum(torch.zeros(1))
    grown = proportional_set_size() - before
    ranks.sum(torch.zeros(1))
    return grown


@pytest.mark.slow
@pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux's smaps_rollup")
@pytest.mark.parametrize("ep_size", [1, 2])
def test_loading_takes_one_base_and_a_fifth_per_node_beside_the_experts(
    pools: Pools, tmp_path: Path, ep_size: int
) -> None:
    changes = {
        "experts": {"allocation": "explicit", "counts": [2] * LAYERS, "classifier_layers": []},
        "parallel": {"ranks": 2, "ep_size": ep_size, "max_imbalance": 2.0, "micro_batch_size": 1},
        "deepspeed": "ds_configs/bf16_zero1.json",
    }
    prepare(tmp_path, distinct_experts=False, **changes)
    found = pools[2].run(memory_while_loading, run_tree(tmp_path, **changes), tmp_path / "stage1")
    while_shared, at_the_end = (sum(bytes_of_ranks) for bytes_of_ranks in zip(*found, strict=True))
    assert 0.9 * BASE < while_shared <= 1.2 * BASE
    assert at_the_end - LAYERS * MLP <= 1.2 * BASE  # each layer's only new expert is read by one rank


@pytest.mark.slow
@pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux's smaps_rollup")
def test_the_ranks_of_a_node_that_score_a_whole_model_share_its_memory(pools: Pools, tmp_path: Path) -> None:
    changes = {
        "experts": {"allocation": "explicit", "counts": [2] * LAYERS, "classifier_layers": []},
        "parallel": {"ranks": 2, "ep_size": 1, "micro_batch_size": 1},
        "deepspeed": "ds_configs/bf16_zero1.json",
    }
    prepare(tmp_path, distinct_experts=True, **changes)
    grown = sum(pools[2].run(memory_while_scoring, run_tree(tmp_path, **changes)))
    model = BASE + LAYERS * MLP
    assert (
        0.5 * model < grown <= 1.2 * model
    )  # of pages that the tests' own process has mapped too, a part counts there

"""A layer with few new experts is on several ranks of a group, so that none computes much more than others.

Run: pytest tests/distributed/test_replicas.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.distributed.parallel_dims import imbalance
from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import moe_layers
from pipeline.model.moe import Routing
from pipeline.training.state import TrainingState
from tests.distributed.conftest import Pools
from tests.distributed.stages import stage_inputs, train_steps, with_parallel

NEW = (2, 1, 3)  # new experts of the layers that have any
TOKENS = 48  # a multiple of the layers' numbers of experts, 3, 2 and 4


def route_evenly(_router: nn.Module, _inputs: Any, routing: Routing) -> Routing:
    """Each expert gets as many tokens as any other."""
    tokens, experts = routing.scores_TE.shape
    first_T = torch.arange(tokens) % experts
    return replace(routing, ids_TK=torch.stack([first_T, (first_T + 1) % experts], dim=1))


def rows_by_layer(ranks: Ranks, tree: dict[str, Any], folder: Path) -> list[int]:
    """The rows that this rank's MLPs compute in each MoE layer."""
    state = TrainingState.start(stage_inputs(tree, 1, folder, ranks), ranks)
    layers = moe_layers(state.engine.module)
    rows = [0] * len(layers)

    def count(layer: int) -> Any:
        def add(_mlp: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows[layer] += len(inputs[0])

        return add

    for index, layer in enumerate(layers):
        layer.router.register_forward_hook(route_evenly)
        for mlp in (layer.base_mlp, *layer.local_experts.experts):
            mlp.register_forward_pre_hook(count(index))
    with torch.no_grad():
        state.engine.module(input_ids=torch.full((1, TOKENS), ranks.rank), use_cache=False)
    state.close()
    return rows


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_the_busiest_rank_of_each_layer_computes_at_most_1_3_times_the_mean(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ep_size: int
) -> None:
    spread = with_parallel(tree, ranks=4, ep_size=ep_size, micro_batch_size=1)
    by_rank = pools[4].run(rows_by_layer, spread, tmp_path)
    for num_new, rows in zip(NEW, zip(*by_rank, strict=True), strict=True):
        assert sum(rows) == 4 * 2 * TOKENS
        factor = max(rows) / (2 * TOKENS)
        assert factor <= 1.3
        groups = min(2, ep_size, num_new)  # of 2, 1 and 3 experts, none can be divided over four ranks
        assert factor == imbalance(num_new, groups)


@pytest.mark.parametrize("ep_size", [2, 4])
def test_replicas_stay_equal_though_each_rank_has_its_own_tokens(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ep_size: int
) -> None:
    spread = with_parallel(tree, ranks=4, ep_size=ep_size, micro_batch_size=1)
    found = [one["weights"] for one in pools[4].run(train_steps, spread, 1, tmp_path, 2)]
    holders = {name: [one[name] for one in found if name in one] for name in found[0] | found[1]}
    assert {len(tensors) for name, tensors in holders.items() if name.startswith("expert")} == {2, 4}
    for name, tensors in holders.items():
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name

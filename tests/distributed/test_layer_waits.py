"""How often a layer waits for the device, and what it does while rows travel.

Run: pytest tests/distributed/test_layer_waits.py
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed.process_group import Ranks
from pipeline.model.backbone import moe_layers
from pipeline.model.moe import MoELayer
from pipeline.model.moe.dispatch import Exchange, Trip
from pipeline.training.state import TrainingState
from tests.distributed.conftest import Pools
from tests.distributed.stages import stage_inputs, with_parallel
from tests.helpers.tiny import HIDDEN

# On a GPU each of these makes the program wait until the device has computed what it asks for.
WAITS = ("nonzero", "bincount", "_local_scalar_dense", "item", "masked_select", "unique", "equal")


class Waits(TorchDispatchMode):
    """Notes operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in arguments[1])
        if name in WAITS or by_mask:
            self.found.append(name)
        return function(*arguments, **(options or {}))


def waits_and_order(
    ranks: Ranks, tree: dict[str, Any], number: int, folder: Path
) -> list[tuple[list[str], int, list[str]]]:
    """Of each layer's forward: operations that wait, how often numbers are read, and in which order things happen."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    found = []
    for one in moe_layers(state.engine.module):
        found.append(_observe(one, torch.randn(24, HIDDEN)))
    state.close()
    return found


def _observe(one: MoELayer, x: torch.Tensor) -> tuple[list[str], int, list[str]]:
    order: list[str] = []
    reads: list[None] = []

    def noting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            return function(*arguments, **options)

        return call

    def tolist(tensor: torch.Tensor) -> Any:
        reads.append(None)
        return original(tensor)

    original = torch.Tensor.tolist
    with (
        patch.object(Exchange, "send", noting("send", Exchange.send)),
        patch.object(Exchange, "arrived", noting("arrived", Exchange.arrived)),
        patch.object(Exchange, "send_back", noting("send back", Exchange.send_back)),
        patch.object(one.base_mlp, "forward", noting("base MLP", one.base_mlp.forward)),
        patch.object(torch.Tensor, "tolist", tolist),
        Waits() as waits,
    ):
        one(x)
    return waits.found, len(reads), order


def trips(ranks: Ranks, tree: dict[str, Any], number: int, folder: Path) -> list[list[str]]:
    """In which order each layer's forward and backward send rows, wait, and compute the base MLP's backward."""
    state = TrainingState.start(stage_inputs(tree, number, folder, ranks), ranks)
    found = [_observe_trips(one) for one in moe_layers(state.engine.module)]
    state.close()
    return found


def _observe_trips(one: MoELayer) -> list[str]:
    order: list[str] = []
    begin, wait = Trip.begin, Trip.wait

    def beginning(trip: Trip, rows: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        order.append("gradients leave" if back else "rows leave")
        return begin(trip, rows, back=back)

    def waiting(trip: Trip) -> None:
        order.append("have come")
        wait(trip)

    one.base_mlp.register_full_backward_pre_hook(lambda *_: order.append("base MLP"))
    with patch.object(Trip, "begin", beginning), patch.object(Trip, "wait", waiting):
        one(torch.randn(24, HIDDEN, requires_grad=True)).sum().backward()
    return order


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_the_backward_computes_that_of_the_base_mlp_while_gradients_travel(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, number: int
) -> None:
    forward = ["rows leave", "have come", "rows leave", "have come"]
    # Those of the outputs come first: experts need them. While those of the rows travel, there is time.
    backward = ["gradients leave", "have come", "gradients leave", "base MLP", "have come"]
    for found in pools[2].run(trips, with_parallel(tree, ranks=2, ep_size=2), number, tmp_path):
        for num_new, order in zip((2, 1, 3), found, strict=True):
            assert order == (["base MLP"] if num_new == 1 else forward + backward)  # every rank has the only expert


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2 with classifiers"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_layer_waits_once_and_computes_the_base_mlp_while_rows_travel(
    pools: Pools, tree: dict[str, Any], tmp_path: Path, ep_size: int, number: int
) -> None:
    spread = with_parallel(tree, ranks=ep_size, ep_size=ep_size)
    for found in pools[ep_size].run(waits_and_order, spread, number, tmp_path):
        for num_new, (waits, reads, order) in zip((2, 1, 3), found, strict=True):
            assert waits == []
            assert reads == 1
            stays = ep_size == 1 or num_new == 1  # every rank has the only expert
            assert order == (["base MLP"] if stays else ["send", "base MLP", "arrived", "send back"])

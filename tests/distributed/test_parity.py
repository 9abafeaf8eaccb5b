"""One rank, two ranks and expert parallelism compute the same. Run: pytest tests/distributed/test_parity.py

ranks x micro-batch x length is the same everywhere, experts are distinct, their number is unequal
(2, 1, 0, 3 new ones), and old tokens fall unevenly on ranks and accumulation steps.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed.process_group import Ranks
from tests.distributed.conftest import Pools
from tests.distributed.observed import count_experts, first_logits, load_with_deepspeeds_own_engine
from tests.distributed.stages import train_steps, with_parallel
from tests.helpers.tiny import prepared_run, run_tree

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# (ranks, ep_size, micro-batch): two accumulation steps each, four samples a micro-step over all ranks
TOPOLOGIES = [(1, 1, 4), (2, 1, 2), (2, 2, 2), (4, 2, 1), (4, 4, 1)]
STEPS = 10
SPREAD = [(ranks, ep_size) for ranks, ep_size, _ in TOPOLOGIES[1:]]
NAMES = [f"{ranks} ranks EP {ep_size}" for ranks, ep_size in SPREAD]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    prepared_run(folder)
    tree = run_tree(folder)
    return tree | {stage: tree[stage] | {"tokens": STEPS * 8 * 32} for stage in ("stage1", "stage2")}


@pytest.fixture(scope="module", params=[1, 2], ids=["stage1", "stage2"])
def results(
    request: pytest.FixtureRequest, pools: Pools, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    number = request.param
    everything = {}
    for ranks, ep_size, micro in TOPOLOGIES:
        folder = tmp_path_factory.mktemp("stage")
        spread = with_parallel(tree, ranks=ranks, ep_size=ep_size, micro_batch_size=micro)
        everything[ranks, ep_size] = pools[ranks].run(train_steps, spread, number, folder, STEPS)
    return number, everything


def merged(ranks: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """All ranks' tensors by canonical name; where several ranks hold one, they must agree."""
    together: dict[str, torch.Tensor] = {}
    for part in ranks:
        for name, tensor in part[key].items():
            if name in together:
                torch.testing.assert_close(tensor, together[name], rtol=0, atol=0)
            together[name] = tensor
    return together


@pytest.mark.parametrize("topology", SPREAD, ids=NAMES)
def test_losses_and_gradient_norm_agree_with_one_rank(results: Any, topology: tuple[int, int]) -> None:
    number, everything = results
    names = ("next_token", "balance") if number == 1 else ("next_token", "lpr", "classifier")
    for ours, expected in zip(everything[topology][0]["rows"], everything[1, 1][0]["rows"], strict=True):
        for name in names:
            assert expected["loss"][name] > 0
            assert ours["loss"][name] == pytest.approx(expected["loss"][name], rel=1e-5, abs=1e-6), name
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert ours["lr"] == expected["lr"]
        assert ours["expert_0_share"] == pytest.approx(expected["expert_0_share"])


@pytest.mark.parametrize("topology", SPREAD, ids=NAMES)
@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_gradients_and_weights_agree_with_one_rank(results: Any, topology: tuple[int, int], what: str) -> None:
    _, everything = results
    ours, expected = merged(everything[topology], what), merged(everything[1, 1], what)
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert tensor.abs().max() > 0, name


def test_only_what_the_stage_trains_has_changed(results: Any) -> None:
    number, everything = results
    for ranks in everything.values():
        for part in ranks:
            assert part["frozen_unchanged"]
            kinds = {
                name.split()[0] if name.startswith("expert") else name.rsplit(".", 2)[-2] for name in part["trained"]
            }
            assert kinds == ({"expert", "wg"} if number == 1 else {"wg", "classifier"})
    trained = merged(everything[2, 2], "weights")
    assert sum(name.startswith("expert") for name in trained) == (6 * 2 if number == 1 else 0)


def test_old_tokens_fall_unevenly_on_ranks_and_accumulation_steps(tree: dict[str, Any], tmp_path: Path) -> None:
    from pipeline.training.sample_order import stage_order
    from tests.distributed.stages import stage_inputs

    inputs = stage_inputs(tree, 2, tmp_path, Ranks(0, 1, torch.device("cpu")))
    order = stage_order(inputs.store, inputs.run.data, inputs.stage, inputs.plan, inputs.run.seed)
    counts = {order.old_tokens(first, 2) for first in range(0, 8 * STEPS, 2)}
    assert len(counts) > 1
    assert 0 in counts


def test_deepspeed_alone_loads_the_upcycled_checkpoint(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    spread = with_parallel(tree, micro_batch_size=4)
    assert pools[1].run(load_with_deepspeeds_own_engine, spread, tmp_path) == [[]]


def test_experts_are_spread_evenly_over_the_model(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    counts = pools[2].run(count_experts, with_parallel(tree, ranks=2, ep_size=2, micro_batch_size=2), tmp_path)
    # A layer's single expert is on both ranks.
    assert [sum(layer) for layer in zip(*counts, strict=True)] == [2, 2, 3]
    assert [sum(held) for held in counts] == [4, 3]


def test_logits_agree_between_topologies(pools: Pools, tree: dict[str, Any], tmp_path: Path) -> None:
    expected = pools[1].run(first_logits, with_parallel(tree, micro_batch_size=4), 1, tmp_path)[0]
    for ep_size in (1, 2):
        spread = with_parallel(tree, ranks=2, ep_size=ep_size, micro_batch_size=2)
        for logits in pools[2].run(first_logits, spread, 1, tmp_path):
            torch.testing.assert_close(logits, expected, **CLOSE)

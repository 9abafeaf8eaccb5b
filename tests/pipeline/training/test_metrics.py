"""What a step's sums count, and at what cost. Run: pytest tests/pipeline/training/test_metrics.py"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.method.losses import routing_statistics
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import Routing
from pipeline.training.metrics import StepSums

TOKENS, COUNTS = 40, (3, 2, 4)


class Counting(TorchDispatchMode):
    """Counts the kernels that are started; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.kernels += "view" not in str(function) and "squeeze" not in str(function)
        return function(*arguments, **(options or {}))


@pytest.fixture
def plan() -> ExpertPlan:
    return ExpertPlan.first_expansion(list(COUNTS), old=["en"], new=["el"], top_k=2, classifier_layers=[])


@pytest.fixture
def routings() -> list[Routing]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in COUNTS:
        scores = torch.rand(TOKENS, count, generator=generator)
        ids = scores.topk(2).indices
        active = torch.rand(TOKENS, 2, generator=generator) > 0.2
        active[:, 0] = True
        found.append(Routing(scores, scores.softmax(-1), ids, torch.ones(TOKENS, 2), active, None))
    return found


def sums_of(plan: ExpertPlan, routings: list[Routing], num_sources: int) -> tuple[StepSums, torch.Tensor]:
    sources = torch.arange(TOKENS) % (num_sources + 1) - 1  # some count for nothing
    sums = StepSums([f"s{number}" for number in range(num_sources)], plan, torch.device("cpu"))
    sums.add_routing(routings, sources)
    sums.add_routing(routings, sources)
    return sums, sources


def test_shares_and_loads_are_those_of_the_tokens_that_count(plan: ExpertPlan, routings: list[Routing]) -> None:
    sums, sources = sums_of(plan, routings, 3)
    figures = sums.read(sums.pack())
    for number in range(3):
        mask = sources == number
        on_0 = [float(routing_statistics(routing, mask)["on_expert_0"] / mask.sum()) for routing in routings]
        assert figures["expert_0_share"][f"s{number}"] == pytest.approx(sum(on_0) / len(on_0))
    for imbalance, routing in zip(figures["load_imbalance"], routings, strict=True):
        choices = routing_statistics(routing, sources >= 0)["choices"]
        assert imbalance == pytest.approx(float(choices.max() / choices.mean()))


def test_a_loss_that_came_later_is_among_the_figures_only_where_the_stage_has_it(plan: ExpertPlan) -> None:
    sums = StepSums(["s0"], plan, torch.device("cpu"))
    sums.add_losses({"next_token": torch.tensor(2.0)})
    assert sums.read(sums.pack())["loss"] == {"next_token": 2.0, "balance": 0.0, "lpr": 0.0, "classifier": 0.0}
    sums.add_losses({"next_token": torch.tensor(1.0), "router_z": torch.tensor(0.5)})
    found = sums.read(sums.pack())["loss"]
    assert found == {"next_token": 3.0, "balance": 0.0, "lpr": 0.0, "classifier": 0.0, "router_z": 0.5}


def test_the_number_of_kernels_depends_on_layers_and_not_on_sources(plan: ExpertPlan, routings: list[Routing]) -> None:
    kernels = []
    for num_sources in (3, 20):
        with Counting() as counting:
            sums_of(plan, routings, num_sources)
        kernels.append(counting.kernels)
    assert kernels[0] == kernels[1]
    assert kernels[0] / 2 <= 10 * len(COUNTS) + 10

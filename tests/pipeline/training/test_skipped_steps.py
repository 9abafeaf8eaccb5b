"""Which steps are skipped. Run: pytest tests/pipeline/training/test_skipped_steps.py"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.run import BadStepsConfig
from pipeline.training.skipped_steps import SkippedSteps


class Training:
    """One weight, trained by plain gradient descent as by DeepSpeed's engine."""

    def __init__(self, **settings: Any) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.engine = SimpleNamespace(basic_optimizer=self.optimizer, optimizer=SimpleNamespace(_global_grad_norm=0.0))
        self.skipped = SkippedSteps(BadStepsConfig(**settings), self.engine)

    def step(self, norm: float, loss: float = 1.0, *, known: bool = True) -> tuple[bool, str | None]:
        """One step with a gradient of 1; whether the weight has changed, and why not."""
        before = float(self.weight.detach())
        self.weight.grad = torch.ones(())
        self.engine.optimizer._global_grad_norm = norm
        self.skipped.expect(loss, norm if known else None)
        self.optimizer.step()
        return float(self.weight.detach()) != before, self.skipped.record(norm)


@pytest.mark.parametrize("known", [True, False], ids=["norm known before", "norm from DeepSpeed"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(known: bool) -> None:
    training = Training()
    assert training.step(1.0, known=known) == (True, None)
    assert training.step(1.0, math.nan, known=known) == (False, "the loss is not finite")
    assert training.step(math.inf, known=known) == (False, "the gradient is not finite")
    assert training.step(1.0, known=known) == (True, None)
    assert training.skipped.count == 2


def test_a_norm_far_above_the_median_is_skipped_once_a_quarter_of_the_window_is_known() -> None:
    training = Training(norm_factor=10, window=8)
    assert training.step(1.0) == (True, None)
    assert training.step(50.0) == (True, None)  # only one norm is known
    assert training.step(1.0) == (True, None)
    assert training.step(11.0) == (False, "the gradient norm 11 is above 10")
    assert training.step(9.0) == (True, None)
    assert all(Training(norm_factor=None).step(norm)[0] for norm in (1.0, 1e9))


def test_too_many_in_a_row_and_counting_starts_again() -> None:
    training = Training(stop_after=2)
    for loss, too_many in ((math.nan, False), (1.0, False), (math.nan, False), (math.nan, True), (math.nan, False)):
        training.step(1.0, loss)
        assert training.skipped.too_many() == too_many


def test_a_resumed_stage_decides_alike() -> None:
    training, resumed = Training(norm_factor=10, window=4), Training(norm_factor=10, window=4)
    for norm in (1.0, 2.0, 100.0):
        training.step(norm)
    resumed.skipped.load(training.skipped.state())
    assert resumed.skipped.count == training.skipped.count == 1
    for norm in (14.0, 16.0, 1.0):
        assert resumed.step(norm)[1] == training.step(norm)[1]

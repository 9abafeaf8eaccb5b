"""Optimizer steps that would do harm are skipped, on all ranks alike."""

import math
import statistics
from collections import deque
from typing import Any

from pipeline.config.run import BadStepsConfig


class SkippedSteps:
    """Decides which steps are skipped, and counts them.

    A step is judged by its loss and gradient norm, which are the same on all ranks. A hook of the optimizer, which
    DeepSpeed calls once it has reduced, measured and clipped the gradients, removes the gradients of a step that is
    to be skipped: the optimizer then changes neither weights nor moments.

    Args:
        settings: the run's ``bad_steps`` section.
        engine: DeepSpeed's.

    Attributes:
        count: how many steps were skipped, in all sessions of the stage.
    """

    def __init__(self, settings: BadStepsConfig, engine: Any) -> None:
        self._settings = settings
        self._optimizer = engine.optimizer
        self._norms: deque[float] = deque(maxlen=settings.window)  # of the steps that were taken
        self._in_a_row = 0
        self._loss_is_finite = True
        self._norm: float | None = None
        self.count = 0
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def expect(self, loss: float, norm: float | None) -> None:
        """Tell the loss of the step to come, and its gradient norm unless DeepSpeed measures it."""
        self._loss_is_finite, self._norm = math.isfinite(loss), norm

    def record(self, norm: float) -> str | None:
        """Count the step that the engine has just taken or skipped; returns why if it was skipped."""
        reason = self._reason(norm)
        if reason is None:
            self._norms.append(norm)
            self._in_a_row = 0
        else:
            self.count += 1
            self._in_a_row += 1
        return reason

    def too_many(self) -> bool:
        """Whether ``stop_after`` steps in a row were skipped; counting in a row then starts at 0 again."""
        if self._in_a_row < self._settings.stop_after:
            return False
        self._in_a_row = 0
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run decides alike: ``norms``, ``count`` and ``in_a_row``."""
        return {"norms": list(self._norms), "count": self.count, "in_a_row": self._in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self._norms = deque(state["norms"], maxlen=self._settings.window)
        self.count, self._in_a_row = state["count"], state["in_a_row"]

    def _reason(self, norm: float) -> str | None:
        """Why a step with this gradient norm is skipped; None if it is taken."""
        if not self._loss_is_finite:
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self._settings.norm_factor is not None and len(self._norms) >= max(1, self._settings.window // 4):
            limit = self._settings.norm_factor * statistics.median(self._norms)
            if norm > limit > 0:
                return f"the gradient norm {norm:.3g} is above {limit:.3g}"
        return None

    def _before_step(self, optimizer: Any, _arguments: Any, _options: Any) -> None:
        norm = self._norm if self._norm is not None else float(self._optimizer._global_grad_norm)
        if self._reason(norm) is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

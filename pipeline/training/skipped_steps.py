"""Steps that would do harm are skipped, on all ranks alike."""

import math
import statistics
from collections import deque
from typing import Any

from pipeline.config.run import BadStepsConfig


class StepGuard:
    """Judges each optimizer step by its loss and gradient norm, which are the same on all ranks.

    It hooks into the optimizer that DeepSpeed calls once it has reduced, measured and clipped the gradients: a
    step without gradients changes neither weights nor moments. Its state is part of a checkpoint.
    """

    def __init__(self, settings: BadStepsConfig) -> None:
        self.settings = settings
        self.norms: deque[float] = deque(maxlen=settings.window)
        self.skipped = self.in_a_row = 0
        self._optimizer: Any = None
        self._loss_is_finite = True
        self._norm: float | None = None

    def watch(self, engine: Any) -> None:
        """Judge every step of this engine's optimizer from now on."""
        self._optimizer = engine.optimizer
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def expect(self, loss: float, norm: float | None) -> None:
        """Say what is known before the step: the loss, and the norm where DeepSpeed does not keep it."""
        self._loss_is_finite, self._norm = math.isfinite(loss), norm

    def reason(self, norm: float) -> str | None:
        """Why a step with this gradient norm is skipped; None if it is good."""
        if not self._loss_is_finite:
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self.settings.norm_factor is not None and len(self.norms) >= max(1, self.settings.window // 4):
            limit = self.settings.norm_factor * statistics.median(self.norms)
            if norm > limit > 0:
                return f"the gradient norm {norm:.3g} is above {limit:.3g}"
        return None

    def record(self, norm: float) -> str | None:
        """Count a step that was taken or skipped; the reason if it was skipped."""
        reason = self.reason(norm)
        if reason is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    def gives_up(self) -> bool:
        """Whether too many steps in a row were skipped; the count then begins anew."""
        if self.in_a_row < self.settings.stop_after:
            return False
        self.in_a_row = 0
        return True

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge the same."""
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.norms = deque(state["norms"], maxlen=self.settings.window)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _before_step(self, optimizer: Any, _arguments: Any, _options: Any) -> None:
        norm = self._norm if self._norm is not None else float(self._optimizer._global_grad_norm)
        if self.reason(norm) is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

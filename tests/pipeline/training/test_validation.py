"""When a stage validates. Run: pytest tests/pipeline/training/test_validation.py"""

import pytest

from pipeline.config.run import ValidateConfig
from pipeline.training.validation import validation_is_due


@pytest.mark.parametrize(
    ("every_tokens", "steps"),
    [
        (None, []),
        (150, [20]),  # not often enough for one before the end
        (40, [4, 8, 12, 16, 20]),
        (60, [6, 12, 20]),  # step 18 is too close to the end
        (1, list(range(1, 21))),
    ],
)
def test_every_so_often_and_at_the_end_but_not_shortly_before(every_tokens: int | None, steps: list[int]) -> None:
    """20 steps of 10 tokens."""
    settings = ValidateConfig(every_tokens=every_tokens)
    assert [step for step in range(1, 21) if validation_is_due(settings, step, 20, 10)] == steps

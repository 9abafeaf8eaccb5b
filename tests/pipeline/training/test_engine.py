"""The learning rate. Run: pytest tests/pipeline/training/test_engine.py"""

import pytest

from pipeline.config.run import StageConfig
from pipeline.training.engine import learning_rate_factor


def test_warm_up_then_a_cosine_to_the_least() -> None:
    stage = StageConfig(tokens=100 * 8, sequence_length=4, global_batch_size=2, warmup_ratio=0.1, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, stage) for step in range(stage.num_steps + 1)]
    assert stage.num_steps == 100
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)  # half-way down
    assert factors[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(factors[10:], factors[11:], strict=False))


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    stage = StageConfig(tokens=80, sequence_length=4, global_batch_size=2, warmup_ratio=0.0)
    assert learning_rate_factor(0, stage) == 1.0

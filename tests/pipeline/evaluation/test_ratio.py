"""Standard errors of ratios. Run: pytest tests/pipeline/evaluation/test_ratio.py"""

import numpy as np
import pytest

from pipeline.evaluation.ratio import ratio_with_error


def test_of_documents_of_one_size_it_is_the_standard_error_of_the_mean() -> None:
    values = np.array([3.0, 5.0, 4.0, 9.0])
    ratio, error = ratio_with_error(values, np.full(4, 2.0))
    assert ratio == pytest.approx((values / 2).mean())
    assert error == pytest.approx((values / 2).std(ddof=1) / 2)


def test_it_is_the_spread_of_the_ratio_over_draws_of_documents() -> None:
    generator = np.random.default_rng(0)
    counts = generator.lognormal(5, 1, (2000, 80))
    bits = counts * generator.normal(2.0, 0.3, counts.shape)
    ratios = bits.sum(1) / counts.sum(1)
    errors = [ratio_with_error(*pair)[1] for pair in zip(bits, counts, strict=True)]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(ratios.std(), rel=0.1)


def test_of_one_document_there_is_none() -> None:
    assert ratio_with_error(np.array([3.0]), np.array([2.0])) == (1.5, None)

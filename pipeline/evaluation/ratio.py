"""A ratio of sums over documents, such as bits per character, and its standard error."""

import math

import numpy as np


def ratio_with_error(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
    """The ratio of two sums, and its standard error over documents by the delta method; None for a single document.

    Documents vary much more than the ratio within a document does, so the two sums are not independent.

    Args:
        above: [documents].
        below: [documents], of the same documents.
    """
    ratio = float(above.sum() / below.sum())
    n = len(below)
    if n < 2:
        return ratio, None
    residuals = above - ratio * below
    return ratio, math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(below.sum())

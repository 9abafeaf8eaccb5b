"""Scores kept by content: a model that has been scored on a text is not scored on it again, by any run."""

from pathlib import Path
from typing import Any

from common.files import content_key
from pipeline.records.evaluation import SetScore

FORMAT = 3  # raised when the same weights and text give other scores


class ScoreCache:
    """A file per (weights, text, window, dtype). In bf16 a score's last digits depend on what shared its batches.

    Args:
        folder: where the files lie.
        window: tokens per scoring window.
        dtype: that models are computed in.
    """

    def __init__(self, folder: Path, window: int, dtype: str) -> None:
        self._folder, self._how = folder, {"format": FORMAT, "window": window, "dtype": dtype}

    def _path(self, weights: Any, text: str) -> Path:
        return self._folder / f"{content_key({'weights': weights, 'text': text, **self._how})}.json"

    def has(self, weights: Any, text: str) -> bool:
        """Whether these weights have been scored on this text."""
        return self._path(weights, text).is_file()

    def load(self, weights: Any, text: str) -> SetScore:
        """The score of these weights on this text, which must be there."""
        return SetScore.load(self._path(weights, text))

    def save(self, weights: Any, text: str, score: SetScore) -> None:
        """Keep a score.

        Args:
            weights: what names the weights: hashes, as JSON holds them.
            text: a hash of the scored tokens and their documents.
            score: what came of it.
        """
        score.save(self._path(weights, text))

"""A score is found by what it is of. Run: pytest tests/pipeline/evaluation"""

from pathlib import Path

import numpy as np

from pipeline.evaluation.score_cache import ScoreCache
from pipeline.evaluation.scoring import SetScore

SCORE = SetScore(np.array([1 / 3, 7.25]), np.array([10, 20]), [0.1], [0.2], [1 / 7])


def test_a_score_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, 1024, "torch.bfloat16")
    assert not cache.has({"dense": "a"}, "text")
    cache.save({"dense": "a"}, "text", SCORE)
    found = cache.load({"dense": "a"}, "text")
    np.testing.assert_array_equal(found.bits, SCORE.bits)
    np.testing.assert_array_equal(found.characters, SCORE.characters)
    assert (found.share_0, found.probability_0, found.classified_old) == ([0.1], [0.2], [1 / 7])
    assert found.bits_per_character == SCORE.bits_per_character


def test_other_weights_text_window_or_dtype_are_another_score(tmp_path: Path) -> None:
    ScoreCache(tmp_path, 1024, "torch.bfloat16").save({"dense": "a"}, "text", SCORE)
    assert ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "a"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "b"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "a"}, "other")
    assert not ScoreCache(tmp_path, 512, "torch.bfloat16").has({"dense": "a"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.float32").has({"dense": "a"}, "text")

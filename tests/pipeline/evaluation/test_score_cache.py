"""A score is found by what it is of. Run: pytest tests/pipeline/evaluation"""

from pathlib import Path

from pipeline.evaluation.score_cache import ScoreCache
from pipeline.records.evaluation import SetScore

SCORE = SetScore(
    bits=[1 / 3, 7.25], characters=[10, 20], expert_0_share=[0.1], probability_0=[0.2], classified_old=[1 / 7]
)


def test_a_score_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, 1024, "torch.bfloat16")
    assert not cache.has({"dense": "a"}, "text")
    cache.save({"dense": "a"}, "text", SCORE)
    assert cache.load({"dense": "a"}, "text") == SCORE


def test_other_weights_text_window_or_dtype_are_another_score(tmp_path: Path) -> None:
    ScoreCache(tmp_path, 1024, "torch.bfloat16").save({"dense": "a"}, "text", SCORE)
    assert ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "a"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "b"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.bfloat16").has({"dense": "a"}, "other")
    assert not ScoreCache(tmp_path, 512, "torch.bfloat16").has({"dense": "a"}, "text")
    assert not ScoreCache(tmp_path, 1024, "torch.float32").has({"dense": "a"}, "text")

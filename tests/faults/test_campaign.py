"""Fifty kills, and the run ends as if there had been none. Run: tests/run.sh --all tests/faults/test_campaign.py"""

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign


@pytest.mark.slow
def test_a_run_killed_50_times_is_the_uninterrupted_one_bit_by_bit(tmp_path: Path) -> None:
    summary = Campaign(tmp_path, kills=50, inside_saves=15, steps=800, seed=1).run()
    print(summary)
    assert summary["kills"] >= 50
    assert summary["inside a save"] >= 15
    assert set(summary["victims"]) == {"rank 0", "rank 1", "both ranks", "launch", "pipeline"}

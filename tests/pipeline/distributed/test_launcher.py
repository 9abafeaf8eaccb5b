"""Which devices ranks get on this machine. Run: pytest tests/pipeline/distributed/test_launcher.py"""

import pytest

from pipeline.distributed import launcher


@pytest.mark.parametrize(
    ("kind", "visible", "expected"),
    [
        ("cuda", None, [0, 1]),
        ("cuda", "2,5,7", ["2", "5"]),
        ("cuda", "GPU-8a1, GPU-77c", ["GPU-8a1", "GPU-77c"]),
        ("cuda", "3", [0, 1]),  # too few, which is refused before
        ("cpu", "2,5", [0, 1]),
    ],
)
def test_ranks_get_the_gpus_that_are_visible_in_their_order(
    monkeypatch: pytest.MonkeyPatch, kind: str, visible: str | None, expected: list[int | str]
) -> None:
    monkeypatch.setattr(launcher, "device_type", lambda: kind)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launcher.devices(2) == expected

"""The same bytes from any number of ranks, in any way, after any kills.

Run: pytest tests/data_prep/executor/test_jobs.py
"""

import random
import shutil
from pathlib import Path

import pytest

from tests.helpers.preparation_jobs import BACKENDS, Job, digests, write_preparation_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run, and the hashes that an undisturbed job on one process gives."""
    folder = tmp_path_factory.mktemp("jobs")
    run = write_preparation_run(folder)
    assert Job(run, "local", 1).wait() == [0], (folder / "log.txt").read_text()
    expected = digests(folder / "cache")
    assert sum(name.endswith(".bin") for name in expected) > 10
    return run, expected


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [
        ("local", 3),
        ("mpi", 2),
        ("array", 2),
        pytest.param("mpi", 1, marks=pytest.mark.slow),
        pytest.param("mpi", 4, marks=pytest.mark.slow),
        pytest.param("array", 4, marks=pytest.mark.slow),
    ],
)
def test_every_way_and_number_of_ranks_gives_the_same_files(
    prepared: tuple[Path, dict[str, str]], backend: str, ranks: int
) -> None:
    run, expected = prepared
    shutil.rmtree(run.parent / "cache")
    assert set(Job(run, backend, ranks).wait()) == {0}, (run.parent / "log.txt").read_text()
    assert digests(run.parent / "cache") == expected


def campaign(run: Path, expected: dict[str, str], kills: int, seed: int) -> None:
    """Kill jobs at random moments, each time relaunched in another way or with another number of ranks."""
    draw = random.Random(seed)
    killed = 0
    while killed < kills:
        shutil.rmtree(run.parent / "cache")
        finished = False
        while not finished and killed < kills:
            backend, ranks = draw.choice(BACKENDS), draw.choice((1, 2, 3, 4))
            if Job(run, backend, ranks).kill_after(draw.randrange(0, 25), draw.random() * 0.4):
                killed += 1
            else:
                finished = True
        assert set(Job(run, draw.choice(BACKENDS), draw.choice((1, 2, 3))).wait()) == {0}, (
            run.parent / "log.txt"
        ).read_text()
        assert digests(run.parent / "cache") == expected, f"after {killed} kills"
        assert not list((run.parent / "cache" / "tokens").glob(".*.work"))


@pytest.mark.slow
def test_jobs_killed_and_relaunched_otherwise_end_with_the_same_files(prepared: tuple[Path, dict[str, str]]) -> None:
    campaign(*prepared, kills=3, seed=1)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_end_with_the_same_files(prepared: tuple[Path, dict[str, str]]) -> None:
    campaign(*prepared, kills=30, seed=2)


@pytest.mark.parametrize(
    ("backend", "ranks"), [("local", 2), ("mpi", 2), pytest.param("array", 2, marks=pytest.mark.slow)]
)
def test_a_bad_row_stops_every_process_with_one_line_and_code_2(backend: str, ranks: int, tmp_path: Path) -> None:
    run = write_preparation_run(tmp_path, documents=100)
    with open(tmp_path / "hu.jsonl", "a", encoding="utf-8") as file:
        file.write("oops\n")
    codes = Job(run, backend, ranks).wait()
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("error: ")]
    assert set(codes) == {2}, lines
    assert len(lines) == (ranks if backend == "array" else 1)
    assert all("hu.jsonl, row " in line and "not JSON" in line for line in lines)
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))

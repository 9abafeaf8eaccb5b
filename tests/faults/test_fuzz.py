"""Any key with any value ends in exit code 0, or in 2 with one line. Run: pytest -m slow tests/faults/test_fuzz.py"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings

from pipeline.records.step_manifest import StepManifest
from tests.faults.fuzz import KEYS, OPTION_VALUES, OPTIONS, VALUES, VERBS, run_command
from tests.helpers.tiny import save_corpus, write_run

CASES = 500
ERROR = re.compile(r"^(?:python -m pipeline[\w ]*: )?error: ", re.M)  # argparse names the command first
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with every kind of set, prepared up to upcycling."""
    folder = tmp_path_factory.mktemp("fuzz")
    text = str(save_corpus(folder / "more", ["tr"])["tr"])
    sets = {"watch": {"tr": {"path": text}}, "benchmarks": {"quiz": {"path": text}}}
    write_run(folder, prepared=True, data=sets, similarity={"min_share": 0.0})
    return folder


def check(prepared: Path, words: list[str]) -> int:
    """The command, in a copy of the prepared run, ends well or with one line, and all that lies there is whole.

    Returns its exit code.
    """
    folder = prepared.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in ("runs", "cache"):
        shutil.copytree(prepared / part, folder / part, symlinks=True)
    own = [f"--set={key}={folder / part}" for key, part in (("output_dir", "runs"), ("cache_dir", "cache"))]
    verb, *options = words
    before = set(Path.cwd().iterdir())
    code, text = run_command([verb, str(prepared / "run.yaml"), *own, *options], prepared / "output.txt")
    assert code in (0, 2), text
    assert "Traceback" not in text, text
    assert code == 0 or len(ERROR.findall(text)) == 1, text
    assert set(Path.cwd().iterdir()) == before
    assert list(half_written(folder)) == []
    return code


def half_written(folder: Path) -> Iterator[str]:
    """What lies in a run's folder and cache and is not whole."""
    yield from (str(path) for path in folder.rglob("*tmp*"))
    for manifest in folder.glob("runs/*/manifests/*.json"):
        StepManifest.load(manifest)


@settings(max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(verb=VERBS, key=KEYS, value=VALUES)
@example(["estimate"], "stage1.tokens", "1e23")
@example(["train"], "stage1.lr", ".inf")
@example(["tokenize"], "output_dir", "/proc/nope/x")
def test_any_value_of_any_key_ends_well_or_in_one_line(prepared: Path, verb: list[str], key: str, value: str) -> None:
    code = check(prepared, [*verb, "--set", f"{key}={value}"])
    event(f"{verb[0]} ended with {code}")  # pytest --hypothesis-show-statistics counts them


@pytest.mark.parametrize("value", OPTION_VALUES)
@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_any_value_of_any_option_ends_well_or_in_one_line(prepared: Path, option: list[str], value: str) -> None:
    check(prepared, [*option, value])

"""What the fuzz tries: verbs, keys and values, and one command in a process of its own."""

import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from common.hosts import free_port
from common.launch_environment import RANK_VARIABLES
from pipeline.config.run import RunConfig
from tests.distributed.test_stale_keys import keys_of

SECONDS = 120.0
CHEAP = [
    ["estimate"], ["estimate", "--device", "80GB"], ["status"], ["tokenize"], ["similarity"], ["allocate"],
    ["upcycle"], ["report"], ["submit", "--dry-run"],
    ["run", "--until", "allocate"], ["run", "--from", "report"], ["fetch"],
]  # fmt: skip
RANK_VERBS = ("train", "evaluate")  # these are done as the only rank, without a launcher
SLOW = [["train"], ["evaluate"], ["train", "--stage", "2"], ["run", "--until", "stage1"]]
OPTIONS = [
    ["estimate", "--ranks"], ["estimate", "--ep-size"], ["estimate", "--device"], ["estimate", "--tokens-per-second"],
    ["run", "--until"], ["run", "--from"], ["train", "--stage"], ["evaluate", "--checkpoint"], ["check", "--ranks"],
    ["submit", "--dry-run", "--until"], ["allocate", "--budgets"], ["allocate", "--budgets", "4", "--device"],
]  # fmt: skip
OPTION_VALUES = ["0", "-1", "inf", "nan", "1e30", "", "é", "a/b", "99999999999999999999"]
EXTREMES = [
    "0", "-1", "1", "2", "0.5", "-0.5", ".inf", "-.inf", ".nan", "1e30", "1e23", "1e-30", "null", "true", "''", "' '",
    "[]", "{}", "[1, 2]", "[0, -1, 99]", "{a: 1}", "{path: x}", "99999999999999999999", "1_000_000", "layerwise", "é",
    "'日本'", "a/b", "..", "/", "/dev/null", "/proc/nope/x", "/dev/full", "x" * 300, "\"a\\nb\"", "\"\\0\"",
    "!!python/x", "&a [*a]", "{", "[[[]]]", "2026-11-24", "0x10", "~", "'%s {x} $HOME'", "-", "\"\\ud83d\"",
]  # fmt: skip
ROLES = {"old": "en", "new": "el", "watch": "tr", "benchmarks": "quiz"}


def keys() -> list[str]:
    """Every key of a run; of the named sets, one of each role."""
    found = set()
    for key in keys_of(RunConfig):
        role = key.split(".")[1] if key.startswith("data.") else ""
        found.add(key.replace("NAME", ROLES.get(role, "en")))
    return sorted(found)


VERBS = st.sampled_from([*CHEAP, *CHEAP, *CHEAP, *SLOW])
KEYS = st.sampled_from(keys())
# An argument of a command line holds no zero byte, and its text is UTF-8.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NUMBERS = st.one_of(st.integers(), st.integers(-2, 12), st.floats(), st.floats(-1, 2)).map(str)
VALUES = st.one_of(st.sampled_from(EXTREMES), NUMBERS, TEXT)


class Ended(NamedTuple):
    """The exit code of a command, and all that it printed."""

    code: int
    text: str


def run_command(words: list[str], output: Path) -> Ended:
    """Run ``python -m pipeline WORDS`` in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.cli.main", "pipeline.run.runner", "tests.faults.fuzz", "transformers"])
    process: ForkServerProcess = context.Process(target=_command, args=(words, str(output)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Ended(-1, f"still running after {SECONDS:g} s:\n{output.read_text(errors='replace')}")
    assert process.exitcode is not None
    return Ended(process.exitcode, output.read_text(encoding="utf-8", errors="replace"))


def _command(words: list[str], output: str) -> None:
    os.setpgid(0, 0)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    is_rank = words[0] in RANK_VERBS
    if is_rank:
        os.environ |= dict(zip(RANK_VARIABLES, ("0", "1", "0", "1", "127.0.0.1", str(free_port())), strict=True))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(output, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.argv = ["python -m pipeline", *words]
    code: object = 1
    try:
        from pipeline.cli.main import command_line

        code = command_line(launched=is_rank)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - what a user would see
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)

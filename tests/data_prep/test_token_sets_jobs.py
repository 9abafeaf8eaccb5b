"""Sets that are added while jobs are killed, come late or work side by side.

Run: pytest tests/data_prep/test_token_sets_jobs.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.config import DataConfig
from data_prep.executor.pool import do_task
from data_prep.make_plan import plan_of
from data_prep.plan import Plan
from data_prep.prepare import plan_preparation
from tests.helpers.preparation import cleaned, config_of, set_folders, stamps
from tests.helpers.preparation_jobs import Job, digests, write_preparation_run

Tree = dict[str, Any]


KILLED = """
import json, os, signal, sys
from pathlib import Path
import data_prep.executor.pool as pool
from data_prep.config import DataConfig
from tests.helpers.preparation import prepare

do_task, left = pool.do_task, [int(sys.argv[4])]
def killed(call):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return do_task(call)
pool.do_task = killed
tree, keep = json.loads(sys.argv[1])
prepare(DataConfig.model_validate(tree), sys.argv[2], 300, Path(sys.argv[3]), 17, keep=keep)
"""


@pytest.mark.slow
def test_kills_while_a_set_is_added_leave_the_others_alone_and_give_the_same_bytes(
    tree: Tree, watched: Tree, write_rows: Any, save_tokenizer: Any, stored: Any, tmp_path: Path
) -> None:
    tree = {**cleaned(tree), "filters": {"exact_duplicates": True}, "replay": {"tokens": 2000}}
    one = stored(tree)
    files = stamps(one)
    more = {**tree, "watch": {"seen": watched}, "replay": {"tokens": 1000}}  # Greek is kept, and its copies counted
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [json.dumps([more, one.keys]), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    for tasks in (3, 9, 9):
        command = [sys.executable, "-c", KILLED, *arguments, str(tasks)]
        assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    two = stored(more, keep=one.keys)
    assert two.keys["el"] == one.keys["el"] and two.keys["en"] != one.keys["en"]
    assert stamps(one) == files
    stored(tree, cache="other")
    other = stored(more, cache="other", keep=one.keys)
    assert other.keys == two.keys
    for name, one_set in two.sets.items():
        for file in ["manifest.json", *one_set.manifest.files]:
            assert (one_set.folder / file).read_bytes() == (other.sets[name].folder / file).read_bytes(), (name, file)
    assert not list((tmp_path / "cache" / "tokens").glob(".*.work"))


@pytest.mark.slow
def test_jobs_that_add_a_set_side_by_side_give_the_bytes_of_one(tmp_path: Path) -> None:
    run = write_preparation_run(tmp_path, documents=100)
    assert Job(run, "local", 1).wait() == [0], (tmp_path / "log.txt").read_text()
    shutil.copytree(tmp_path / "cache", tmp_path / "before")
    settings = yaml.safe_load(run.read_text())
    settings["data"]["replay"] = {"tokens": 10_000}
    run.write_text(yaml.safe_dump(settings))
    assert Job(run, "local", 1).wait() == [0], (tmp_path / "log.txt").read_text()
    expected = digests(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    shutil.move(tmp_path / "before", tmp_path / "cache")
    assert set(Job(run, "array", 3).wait()) == {0}, (tmp_path / "log.txt").read_text()
    assert digests(tmp_path / "cache") == expected


def test_a_job_that_comes_late_follows_the_plan_that_is_there(
    tree: Tree, watched: Tree, save_tokenizer: Any, stored: Any, tmp_path: Path
) -> None:
    data = DataConfig.model_validate({**tree, "watch": {"seen": watched}})
    planned = plan_preparation(config_of(data, save_tokenizer(), 300, tmp_path / "cache", 17))
    first = plan_of(planned)
    first.save(tmp_path / "plan.json")
    stored(tree)  # another run prepares two of the three sets meanwhile
    late = plan_of(planned)
    assert [one.name for one in late.sets] == ["seen"]
    late.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first


def test_a_set_that_another_run_finishes_meanwhile_is_left_alone(
    tree: Tree, watched: Tree, stored: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = {**tree, "watch": {"seen": watched}}

    def interrupted(call: Any) -> Any:
        if call.function.__name__ == "publish":
            raise KeyboardInterrupt
        return do_task(call)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.executor.pool.do_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored(both)
    assert set_folders(tmp_path / "cache") == []
    other = stored(tree)
    files = stamps(other)
    unfinished = tmp_path / "cache" / "tokens" / stored(both, cache="elsewhere").keys["seen"]
    (unfinished / "train").mkdir(parents=True)  # what somebody deleted in part
    store = stored(both)
    assert stamps(other) == files
    store.verify()

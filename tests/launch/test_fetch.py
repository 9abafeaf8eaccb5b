"""What a run names on the hub, fetched once; then the network is cut off. Run: pytest tests/launch/test_fetch.py"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_run
from pipeline.run.fetch_datasets import with_commits
from tests.helpers.hub_server import Hub, running_hub
from tests.helpers.tiny import write_run
from tests.launch.test_commands import command

PIPELINE = (sys.executable, "-m", "pipeline")
CUT_OFF = ("unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "_")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_hub_run(folder: Path, **changes: Any) -> Path:
    """A tiny run whose model is on the hub."""
    return write_run(folder, **{"model": {"path": "tiny/model"}, "parallel": {"ranks": 2, "ep_size": 2}, **changes})


def variables(hub: Hub, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}


def can_cut_off() -> bool:
    return os.geteuid() == 0 and not subprocess.run([*CUT_OFF, "true"], capture_output=True, check=False).returncode


@pytest.mark.slow
def test_after_fetch_every_step_runs_with_the_network_cut_off(hub: Hub, tmp_path: Path) -> None:
    if not can_cut_off():
        pytest.skip("cutting off the network needs root and namespaces")
    configs = [f"- {{config_name: {name}, data_files: {name}/*.jsonl}}" for name in ("el", "hu")]
    card = "\n".join(["---", "license: cc-by-4.0", "configs:", *configs, "---", ""]).encode()
    path = write_hub_run(tmp_path, data={"new": {name: {"hub": "tiny/text", "config": name} for name in ("el", "hu")}})
    commit = hub.commit("models", "tiny/model", files_of(tmp_path / "model"))
    texts = {f"{name}/{name}.jsonl": (tmp_path / "text" / f"{name}.jsonl").read_bytes() for name in ("el", "hu")}
    first = hub.commit("datasets", "tiny/text", {"README.md": card, "other/big.jsonl": b"{}", **texts})
    output = command(*PIPELINE, "fetch", str(path), **variables(hub, tmp_path))
    assert f"fetch: tiny/model at {commit}: " in output
    assert f"fetch: tiny/text@:el:train at {first}: 2 files" in output
    assert not list((tmp_path / "hf").rglob("big.jsonl"))
    fetched = json.loads((tmp_path / "runs" / "tiny" / "fetched.json").read_text())["datasets"]
    assert [entry.license for entry in with_commits(load_run(path), fetched)["new"].values()] == ["cc-by-4.0"] * 2
    hub.commit("datasets", "tiny/text", {"README.md": card})
    asked = len(hub.requests)
    output = command(*CUT_OFF, *PIPELINE, "run", str(path), **variables(hub, tmp_path))
    assert "bits/char" in output
    assert len(hub.requests) == asked
    assert (tmp_path / "runs" / "tiny" / "manifests" / "evaluate.json").is_file()


@pytest.mark.slow
def test_only_the_files_that_caps_need_are_fetched_and_read(hub: Hub, tmp_path: Path) -> None:
    path = write_hub_run(
        tmp_path,
        model={"path": str(tmp_path / "model")},
        data={
            "new": {"el": {"hub": "tiny/text", "max_documents": 20}},
            "watch": {"seen": {"hub": "tiny/text", "split": "test", "language": "el", "max_documents": 10}},
        },
    )
    files = {}
    for split in ("train", "test"):
        for number in range(30):
            texts = [" ".join(f"{split}{number}x{row}y{word}" for word in range(20)) for row in range(10)]
            rows = [{"text": text, "page": f"{number}-{row}"} for row, text in enumerate(texts)]
            files[f"data/{split}-{number:05d}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.commit("datasets", "tiny/text", files)
    output = command(*PIPELINE, "fetch", str(path), **variables(hub, tmp_path))
    assert "fetch: tiny/text@" in output and ":train: 8 files, 0.00 GB" in output
    fetched = json.loads((tmp_path / "runs" / "tiny" / "fetched.json").read_text())["datasets"]
    assert {name: len(entry["data_files"]) for name, entry in fetched.items()} == {
        "tiny/text@::train": 8, "tiny/text@::test": 8,
    }  # fmt: skip
    there = {file.name for file in (tmp_path / "hf").rglob("*.jsonl")}
    assert there == {Path(file).name for entry in fetched.values() for file in entry["data_files"]}
    asked = len(hub.requests)
    command(*PIPELINE, "tokenize", str(path), **variables(hub, tmp_path))
    assert len(hub.requests) == asked
    statistics = json.loads((tmp_path / "runs" / "tiny" / "data_statistics.json").read_text())["sets"]
    assert statistics["el"]["train"]["documents"] == 20
    assert 8 <= statistics["seen"]["held_out"]["documents"] <= 16


def test_what_was_fetched_stays_though_the_hub_moves_on(hub: Hub, tmp_path: Path) -> None:
    path = write_hub_run(tmp_path)
    files = files_of(tmp_path / "model")
    first = hub.commit("models", "tiny/model", {**files, "pytorch_model.bin": b"old weights", "model.onnx": b"other"})
    command(*PIPELINE, "fetch", str(path), **variables(hub, tmp_path))
    fetched = json.loads((tmp_path / "runs" / "tiny" / "fetched.json").read_text())["models"]["tiny/model"]
    assert fetched["commit"] == first
    assert sorted(os.listdir(fetched["folder"])) == sorted(files)  # no second kind of weights
    second = hub.commit("models", "tiny/model", {**files, "generation_config.json": b"{}"})
    asked = len(hub.requests)
    command(*PIPELINE, "tokenize", str(path), **variables(hub, tmp_path))
    assert len(hub.requests) == asked
    resolved = yaml.safe_load((tmp_path / "runs" / "tiny" / "run.yaml").read_text())
    assert resolved["model"]["path"] == fetched["folder"]
    assert first in fetched["folder"]
    output = command(*PIPELINE, "fetch", str(path), **variables(hub, tmp_path))
    assert second in output


def test_a_name_that_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    path = write_hub_run(tmp_path, model={"path": "tiny/nothing"})
    output = command(*PIPELINE, "fetch", str(path), code=2, **variables(hub, tmp_path))
    assert [line for line in output.splitlines() if line.startswith("error: ")] == output.strip().splitlines()[-1:]
    assert "model.path: the hub does not give tiny/nothing" in output


def test_what_was_fetched_and_is_gone_is_named(hub: Hub, tmp_path: Path) -> None:
    path = write_hub_run(tmp_path)
    hub.commit("models", "tiny/model", files_of(tmp_path / "model"))
    command(*PIPELINE, "fetch", str(path), **variables(hub, tmp_path))
    (tmp_path / "hf").rename(tmp_path / "moved")
    output = command(*PIPELINE, "tokenize", str(path), code=2, **variables(hub, tmp_path))
    assert "model.path: tiny/model was fetched to " in output
    assert "which is gone; fetch it again" in output


def test_after_fetch_a_task_s_data_is_at_hand_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = write_hub_run(tmp_path, model={"path": str(tmp_path / "model")})
    task = {"task": "quiz", "dataset_path": "tiny/quiz", "output_type": "multiple_choice", "test_split": "test",
            "doc_to_text": "question", "doc_to_choice": ["yes", "no"], "doc_to_target": "answer"}  # fmt: skip
    (tmp_path / "quiz").mkdir()
    (tmp_path / "quiz" / "quiz.yaml").write_text(yaml.safe_dump(task))
    card = b"---\nconfigs:\n- {config_name: default, data_files: [{split: test, path: test.jsonl}]}\n---\n"
    rows = "".join(json.dumps({"question": f"Is {n} even?", "answer": n % 2}) + "\n" for n in range(3))
    hub.commit("datasets", "tiny/quiz", {"README.md": card, "test.jsonl": rows.encode()})
    online = variables(hub, tmp_path)
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    tasks = f"load_tasks(['{tmp_path}/quiz'], None).tasks"
    load = f"from pipeline.evaluation.task_list import load_tasks; print(len({tasks}['quiz'].eval_docs))"
    missing = command(*PIPELINE, "fetch", str(path), "--tasks", str(tmp_path / "quiz"), code=2, **offline)
    assert missing.splitlines()[-1].startswith("error: --tasks quiz: its data is not here (Couldn't reach 'tiny/quiz'")
    output = command(*PIPELINE, "fetch", str(path), "--tasks", str(tmp_path / "quiz"), **online)
    assert "fetch: quiz: 3 documents" in output
    assert command(sys.executable, "-c", load, **offline).splitlines()[-1] == "3"

"""The commands that users type, as they type them. Run: pytest tests/launch"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.tiny import write_run

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def command(*words: str, code: int = 0, seconds: float = 280, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command in the repository, or in another folder; its output."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    path = f"{BIN}{os.pathsep}{clean.get('PATH', '')}"
    done = subprocess.run(
        words, cwd=cwd, env={**clean, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_train_sh_is_valid_bash_and_python() -> None:
    command("bash", "-n", "launch/train.sh")
    compile((ROOT / "launch" / "train.sh").read_text(), "launch/train.sh", "exec")


def test_run_does_everything_on_two_ranks_and_a_second_run_skips_it(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        parallel={"ranks": 2, "ep_size": 2},
        validate={"every_tokens": 768, "max_tokens_per_set": 200},
        log={"tensorboard": True},
        deepspeed="ds_configs/fp32_zero1.json",
    )
    first = command(sys.executable, "-m", "pipeline", "run", str(path))
    folder = tmp_path / "runs" / "tiny"
    for heading in ("bits/char, lower is better", "NEW   el", "OLD   en", "base   stage1   stage2", "report: "):
        assert heading in first
    assert (folder / "report.html").stat().st_size > 100_000
    rows = [json.loads(line) for line in (folder / "stage2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"lpr", "classifier", "next_token"} <= {name for name, value in rows[0]["loss"].items() if value > 0}
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    best = json.loads((folder / "stage1" / "best.json").read_text())
    assert (folder / "stage1" / best["tag"] / "manifest.json").is_file()

    second = command(sys.executable, "-m", "pipeline", "run", str(path))
    for step in ("tokenize", "similarity", "allocate", "upcycle", "stage1", "stage2", "evaluate"):
        assert f"{step}: done, skipped" in second


@pytest.mark.slow
def test_what_was_computed_once_is_not_computed_again(tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"ranks": 2, "ep_size": 2}, validate={"every_tokens": 768})
    folder = tmp_path / "runs" / "tiny"
    command(sys.executable, "-m", "pipeline", "run", str(path), "--until", "stage1")
    assert (folder / "manifests" / "stage1.json").is_file()
    assert not (folder / "stage2").exists()
    assert "stage1: done, skipped" in command(sys.executable, "-m", "pipeline", "run", str(path))

    # Another learning rate, another name: tokens, similarities and upcycled weights are those of before.
    other = command(
        sys.executable, "-m", "pipeline", "run", str(path),
        "--set", "name=other", "--set", "stage1.lr=1e-3", "--until", "upcycle",
    )  # fmt: skip
    assert "tokens: en, el, hu: there already, skipped" in other
    assert other.count("is there already, skipped") == 2

    scored = command(sys.executable, "-m", "pipeline", "evaluate", str(path), "--checkpoint", "stage1/best")
    assert f"{folder}/evaluations/stage1-best.json" in scored

    # Another window makes the scores stale and nothing else; back at the first one, all scores are there still.
    run = (sys.executable, "-m", "pipeline", "run", str(path))
    asked = command(*run, "--set", "evaluate.window=64", code=2)
    assert "evaluate: done in" in asked and "window was 1024, is 64" in asked
    again = command(*run, "--set", "evaluate.window=64", "--force")
    assert "stage2: done, skipped" in again and again.count("evaluate: stage2 ") == 3
    back = command(*run, "--force")
    assert "evaluate: stage2 " not in back and "bits/char, lower is better" in back


@pytest.mark.slow
def test_stage_2_refuses_damaged_experts_of_stage_1_by_name(tmp_path: Path) -> None:
    path = write_run(tmp_path, prepared=True)
    command(sys.executable, "-m", "pipeline", "run", str(path), "--until", "stage1")
    expert = tmp_path / "runs" / "tiny" / "stage1" / "step000006" / "layer_0_expert_1_mp_rank_00_model_states.pt"
    expert.write_bytes(expert.read_bytes()[:-1])
    output = command(sys.executable, "-m", "pipeline", "train", str(path), "--stage", "2", code=2)
    assert f"{expert.parent}: {expert.name} damaged or missing" in output
    assert not (tmp_path / "runs" / "tiny" / "stage2").exists()


@pytest.mark.slow
def test_a_signal_to_the_command_saves_stops_all_ranks_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        prepared=True,
        parallel={"ranks": 2, "ep_size": 2},
        stage1={"tokens": 8 * 32 * 150, "sequence_length": 32, "global_batch_size": 8},
    )
    words = [sys.executable, "-m", "pipeline", "run", str(path), "--until", "stage1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "runs" / "tiny" / "stage1" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3  # the launcher and two ranks
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert re.search(r"^stage 1: stopping after this step, about \d+ s; again to end now$", output, re.M)
    assert "stopped by SIGINT" in output
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    steps = metrics.read_text().count("\n")
    assert 3 <= steps < 150
    tags = sorted(tag.parent.name for tag in metrics.parent.glob("step*/manifest.json"))
    assert tags == [f"step{steps:06d}"]
    again = command(*words)
    assert f"after {steps} steps" in again
    assert metrics.read_text().count("\n") == 150


def test_train_sh_under_deepspeed_trains_both_stages_and_then_evaluates(tmp_path: Path) -> None:
    path = write_run(tmp_path, prepared=True)
    folder, words = tmp_path / "runs" / "tiny", [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29611"]
    output = command(*words, "launch/train.sh", str(path), DS_ACCELERATOR="cpu")
    for number in (1, 2):
        assert f"stage {number}: 6 steps of 8 x 32 tokens on 2 ranks" in output
        assert (folder / "manifests" / f"stage{number}.json").is_file()
    output = command(*words, "launch/train.sh", "evaluate", str(path), "--report", DS_ACCELERATOR="cpu")
    assert "OLD   en" in output and f"report: {folder}/report.html" in output


@pytest.mark.slow
def test_train_sh_as_a_shell_script_trains_stage_1(tmp_path: Path) -> None:
    path = write_run(tmp_path, prepared=True)
    assert "6 steps of 8 x 32 tokens on 1 ranks" in command("bash", "launch/train.sh", str(path), "--stage", "1")
    assert (tmp_path / "runs" / "tiny" / "manifests" / "stage1.json").is_file()


def test_a_users_mistake_is_one_line_and_exit_code_2_under_the_launcher_too(tmp_path: Path) -> None:
    path = write_run(tmp_path, parallel={"ranks": 3, "ep_size": 2})
    output = command(sys.executable, "-m", "pipeline", "run", str(path), code=2)
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        "error: parallel.ep_size: 2 does not divide the number of ranks, 3; "
        "start a multiple of 2 ranks, or use --set parallel.ep_size=1"
    ]


def test_a_task_of_srun_that_is_not_the_first_names_the_mistake_in_its_share_of_the_text(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with open(tmp_path / "text" / "en.jsonl", "a") as file:
        file.write("no JSON\n")
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "node1"}  # fmt: skip
    # The first task is not here: this one does all of the text.
    output = command(sys.executable, "launch/train.sh", "tokenize", str(path), code=2, **task)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert errors[0].startswith(f"error: rank 1: {tmp_path}/text/en.jsonl, row 61: ")


def test_help_says_what_each_verb_reads_and_writes() -> None:
    for verb in ("run", "tokenize", "similarity", "allocate", "upcycle", "train", "evaluate", "report"):
        text = command(sys.executable, "-m", "pipeline", verb, "--help")
        assert "Reads " in text
        assert "writes " in text

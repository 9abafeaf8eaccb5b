"""Exports in environments of torch, transformers and accelerate alone, at the oldest and newest transformers that are
supported. Run: pytest tests/export/test_fresh_environment.py"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.test_folder import FAMILIES, FIRST, SECOND, export_of, run_client

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
VERSIONS = ["5.17.0", "5.24.0"]
TOO_OLD = "5.12.1"
CASES = [(family, FIRST) for family in FAMILIES] + [("llama", SECOND)]


def environment(folder: Path, version: str) -> str:
    """An interpreter of an environment that has nothing else; accelerate is what ``device_map`` needs."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    [torch] = [line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch==")]
    words = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", torch, "accelerate"]
    done = subprocess.run([*words, f"transformers=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip can't install transformers {version}: {done.stderr.strip().splitlines()[-1]}")
    return words[0]


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return environment(tmp_path_factory.mktemp("environment"), request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "plan"), CASES, ids=[f"{family}-{plan.num_groups}" for family, plan in CASES])
def test_all_that_people_do_with_a_model_works(python: str, family: str, plan: Any, tmp_path: Path) -> None:
    said = export_of(family, plan, tmp_path)
    found = run_client(tmp_path, python=python)
    assert said.difference < 1e-5 and found["eager"] < 1e-5
    assert found["grouped_mm"] < 1e-4 and found["batched_mm"] < 1e-4
    for way in ("without a cache", "static cache", "left padding", "pipeline", "saved and loaded", "saved code",
                "offloaded"):  # fmt: skip
        assert found[way], way
    assert found["offloaded difference"] < 1e-4 and found["token by token"] < 1e-4
    assert found["gradient checkpointing"] < 1e-4 and found["router gradient"] > 0
    assert found["bf16"] == ["torch.float32", "torch.bfloat16"]


@pytest.mark.slow
def test_an_older_transformers_says_which_it_needs(tmp_path: Path) -> None:
    export_of("llama", FIRST, tmp_path)
    load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'exported')!r}, "
    words = [environment(tmp_path / "old", TOO_OLD), "-c", load + "trust_remote_code=True)"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode
    assert (
        f"transformers>=5.17 is required for a normal functioning of this module, but found transformers=={TOO_OLD}"
        in (done.stderr)
    )
    assert "This model's code needs it: pip install -U transformers" in done.stderr

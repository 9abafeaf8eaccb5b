"""An exported folder goes to a hub on this machine, and is loaded from there. Run: pytest tests/launch/test_push.py"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.test_folder import FIRST, export_of
from tests.helpers.hub_server import Hub, running_hub
from tests.helpers.hub_uploads import TOKEN
from tests.helpers.tiny import write_run
from tests.launch.test_commands import command

PUSH = (sys.executable, "-m", "pipeline", "push")
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ours, theirs = (AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in sys.argv[1:])
weights = dict(theirs.named_parameters())
assert all(torch.equal(one, weights[name]) for name, one in ours.named_parameters()) and len(weights) > 10
print("the same", type(theirs).__name__)
"""
CARD = '---\nlicense: other\n---\n\n# tiny\n\n`from_pretrained("FOLDER")`\n'


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_of("llama", FIRST, folder)
    (folder / "exported" / "README.md").write_text(CARD)
    (folder / "exported" / "own_tokenizer").mkdir()
    (folder / "exported" / "own_tokenizer" / "tokenizer.json").write_text("{}")
    return folder / "exported"


def files_in(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def write_exported_run(folder: Path, exported: Path) -> Path:
    path = write_run(folder)
    shutil.copytree(exported, folder / "runs" / "tiny" / "export")
    return path


def variables(hub: Hub, folder: Path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", **more}  # fmt: skip


def test_what_was_pushed_is_loaded_from_the_hub_and_is_the_same(hub: Hub, exported: Path, tmp_path: Path) -> None:
    path = write_exported_run(tmp_path, exported)
    output = command(*PUSH, str(path), "--to", "me/tiny", "--private", **variables(hub, tmp_path))
    commit = (hub.folder / "models" / "me--tiny" / "main").read_text()
    assert re.search(rf"push: .*export as me/tiny at {commit}, 0.00 GB: {hub.address}/me/tiny", output)
    assert hub.created["me/tiny"]["visibility"] == "private"
    there = hub.files("models", "me/tiny")
    assert there.pop("README.md").decode() == CARD.replace("FOLDER", "me/tiny")
    assert there.pop(".gitattributes"), "which a hub makes itself"
    assert there == {name: file.read_bytes() for name, file in files_in(exported).items() if name != "README.md"}
    output = command(sys.executable, "-c", LOAD, str(exported), "me/tiny", **variables(hub, tmp_path))
    assert "the same UpcycledLlamaForCausalLM" in output


def test_a_second_push_uploads_what_has_changed_and_takes_away_old_shards(
    hub: Hub, exported: Path, tmp_path: Path
) -> None:
    path = write_exported_run(tmp_path, exported)
    hub.created["me/tiny"] = {}
    hub.commit("models", "me/tiny", {"model-00002-of-00002.safetensors": b"old", "mine.txt": b"the owner's"})
    command(*PUSH, str(path), "--to", "me/tiny", **variables(hub, tmp_path))
    names = sorted([*files_in(exported), "mine.txt"])
    assert sorted(hub.files("models", "me/tiny")) == names
    assert sum(one.startswith("PUT ") for one in hub.requests) == 1
    folder = tmp_path / "runs" / "tiny" / "export"
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    command(*PUSH, str(path), "--to", "me/tiny", **variables(hub, tmp_path))
    assert sum(one.startswith("PUT ") for one in hub.requests) == 1, "the weights are there"
    assert hub.files("models", "me/tiny")["generation_config.json"] == b'{"max_new_tokens": 7}'


def test_a_mistake_is_one_line(hub: Hub, exported: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    settings = variables(hub, tmp_path)

    def line(to: str, **more: str) -> str:
        output = command(*PUSH, str(path), "--to", to, code=2, **{**settings, **more})
        [line] = [one for one in output.splitlines() if one.startswith("error: ")]
        return line

    assert line("me/tiny").endswith(
        "export is not an exported model; make it with: python -m pipeline export RUN.yaml"
    )
    shutil.copytree(exported, tmp_path / "runs" / "tiny" / "export")
    assert "give a model's name on the hub, such as --to owner/name" in line("tiny")
    assert re.search("the hub does not take me/tiny .*401.*; check the name and that you may write: hf auth login",
                     line("me/tiny", HF_TOKEN="wrong"))  # fmt: skip
    assert "the hub does not take me/tiny (OfflineModeIsEnabled" in line("me/tiny", HF_HUB_OFFLINE="1")
    assert not hub.created

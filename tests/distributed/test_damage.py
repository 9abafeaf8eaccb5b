"""A damaged checkpoint is named and the one before it is used. Run: pytest tests/distributed/test_damage.py"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from pipeline.checkpoint.inspect import find_tag, inspect_text, verify_text
from pipeline.checkpoint.store import MANIFEST, complete_tags, read_manifest
from pipeline.checkpoint.tensors import load_tensors, main_file
from pipeline.checkpoint.verify import newest_sound_tag
from pipeline.distributed.process_group import Ranks
from pipeline.records.checkpoint import CheckpointManifest
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, with_parallel
from tests.faults.disk import small_disk
from tests.helpers.tiny import prepared_run, run_tree

ALONE = Ranks(0, 1, torch.device("cpu"))
GOOD, BAD = "step000002", "step000003"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [truncate, empty, flip_a_bit, os.remove]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("damage")
    prepared_run(folder)
    tree = with_parallel(run_tree(folder), ranks=2, ep_size=2, micro_batch_size=2)
    return {**tree, "checkpoint": {"every_minutes": None, "keep": 3}}


@pytest.fixture(scope="module", params=[1, 2], ids=["stage1", "stage2"])
def saved(
    request: pytest.FixtureRequest, pools: Pools, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two checkpoints of a stage."""
    folder = tmp_path_factory.mktemp("saved")
    pools[2].run(train_steps, tree, request.param, folder, 2, 2)
    pools[2].run(train_steps, tree, request.param, folder, 3, 3, True)
    assert complete_tags(folder) == [BAD, GOOD]
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "stage"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_each_file_of_a_checkpoint_is_named_if_damaged_and_the_checkpoint_before_is_used(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    names = [path.name for path in (folder / BAD).iterdir()]
    # Manifest and weights of all; then two ranks' optimizers and six experts, or the routers' optimizer.
    assert len(names) in (10, 3)
    for name in names:
        path = folder / BAD / name
        content = path.read_bytes()
        damage(path)
        tag, complaints = newest_sound_tag(folder, ALONE)
        assert tag == GOOD, name
        assert any(name in line and BAD in line for line in complaints), (name, complaints)
        with pytest.raises(UserError, match=name):
            verify_text(folder / BAD)
        path.write_bytes(content)
    assert newest_sound_tag(folder, ALONE) == (BAD, [])


@pytest.mark.parametrize("content", [None, "", "step999999", "\x00\xff"], ids=["missing", "empty", "unknown", "bytes"])
def test_a_bad_latest_is_named_and_the_newest_complete_checkpoint_is_used(folder: Path, content: str | None) -> None:
    latest = folder / "latest"
    if content is None:
        latest.unlink()
    else:
        latest.write_text(content, encoding="latin-1")
    tag, complaints = newest_sound_tag(folder, ALONE)
    assert tag == BAD
    assert len(complaints) == 1
    assert str(latest) in complaints[0]


def test_ranks_fall_back_together_and_train_on(pools: Pools, tree: dict[str, Any], folder: Path) -> None:
    flip_a_bit(folder / BAD / main_file())
    stage = read_manifest(folder / GOOD, CheckpointManifest).stage
    rows = pools[2].run(train_steps, tree, stage, folder, 4, None, True)
    assert [[row["step"] for row in part["rows"]] for part in rows] == [[3, 4], [3, 4]]


def test_a_damaged_checkpoint_is_written_again_when_training_comes_to_its_step(
    pools: Pools, tree: dict[str, Any], folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in (folder / BAD).iterdir()}
    stage = read_manifest(folder / GOOD, CheckpointManifest).stage
    flip_a_bit(folder / BAD / main_file())
    pools[2].run(train_steps, tree, stage, folder, 3, 3, True)
    assert newest_sound_tag(folder, ALONE) == (BAD, [])
    after = {path.name: path.read_bytes() for path in (folder / BAD).iterdir()}
    assert set(after) == set(before)
    weights = [name for name in before if name.endswith("model_states.pt")]
    assert all(after[name] == before[name] for name in weights)


def test_a_damaged_checkpoint_ahead_does_not_crowd_out_those_that_are_saved_after_falling_back(
    pools: Pools, tree: dict[str, Any], folder: Path
) -> None:
    damaged = (folder / BAD).rename(folder / "step000009")
    flip_a_bit(damaged / main_file())
    stage = read_manifest(folder / GOOD, CheckpointManifest).stage
    keep_one = {**tree, "checkpoint": {**tree["checkpoint"], "keep": 1}}
    pools[2].run(train_steps, keep_one, stage, folder, 4, 4, True)
    assert complete_tags(folder) == ["step000004"]


def test_what_an_interrupted_save_left_is_removed_by_the_next(
    pools: Pools, tree: dict[str, Any], folder: Path
) -> None:
    stage = read_manifest(folder / GOOD, CheckpointManifest).stage
    (folder / BAD / MANIFEST).unlink()
    (folder / BAD / ".half.tmp7").write_bytes(b"x")
    pools[2].run(train_steps, tree, stage, folder, 4, 4, True)
    assert complete_tags(folder) == ["step000004", GOOD]
    assert not (folder / BAD).exists()


def test_damaged_upcycled_weights_are_named_before_training(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    prepared_run(tmp_path)
    broken = with_parallel(run_tree(tmp_path), ranks=2, ep_size=2, micro_batch_size=2)
    expert = next((tmp_path / "cache" / "upcycled").glob("*/upcycled/layer_2_expert_1_*"))
    flip_a_bit(expert)
    with pytest.raises(AssertionError, match=f"AgreedError: .*{expert.name} damaged or missing; upcycle again"):
        pools[2].run(train_steps, broken, 1, tmp_path / "stage", 1)


def test_a_full_disk_is_one_line_on_all_ranks_and_the_earlier_checkpoint_stays(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    pools[2].run(train_steps, tree, 1, tmp_path / "probe", 1, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "probe" / "step000001").iterdir())
    with small_disk(tmp_path / "disk", f"{size * 8 // 5 // 1024 + 64}k") as disk:
        stage = disk.folder / "stage"
        pools[2].run(train_steps, tree, 1, stage, 1, 1)
        with pytest.raises(AssertionError) as error:
            pools[2].run(train_steps, tree, 1, stage, 2, 2, True)
        line = f"AgreedError: {stage / 'step000002'}: can't be written (the disk is full); checkpoints before it are"
        assert str(error.value).count(line) == 2
        assert [path.name for path in stage.glob("step*")] == ["step000001"]
        assert newest_sound_tag(stage, ALONE) == ("step000001", [])
        disk.resize(f"{4 * size // 1024}k")
        rows = pools[2].run(train_steps, tree, 1, stage, 2, 2, True)[0]["rows"]
        assert [row["step"] for row in rows] == [2]
        assert complete_tags(stage) == ["step000002", "step000001"]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was-run",)


def test_a_checkpoint_from_a_stranger_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt: can't be read as a checkpoint file"):
        load_tensors(tmp_path / "bad.pt")
    assert not (tmp_path / "was-run").exists()


def test_a_checkpoint_holds_no_enum_which_older_pythons_pickle_as_code(folder: Path) -> None:
    files = sorted((folder / BAD).glob("*.pt"))
    assert files
    known = {"deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.utils.tensor_fragment.fragment_address"}
    for path in files:
        assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) <= known, path.name


def test_inspect_says_what_a_checkpoint_is(folder: Path) -> None:
    assert verify_text(folder / GOOD).startswith(f"{folder / GOOD}: sound (")
    assert find_tag(folder) == folder / BAD
    text = inspect_text(folder / BAD)
    for name, value in {"step": "3", "samples": "24", "ranks": "2", "ep size": "2", "": "3 2 1 4",
                        "round 1": "el hu: 6 experts from expert 0"}.items():  # fmt: skip
        assert f"{name:22}{value}" in text.splitlines(), text
    assert "optimizer             " in text
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_tag(folder.parent)

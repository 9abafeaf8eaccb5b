"""A run resumes on another number of ranks as if nothing had happened."""

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.optimizer_state import SavedOptimizer
from pipeline.checkpoint.resize import resize
from pipeline.checkpoint.store import read_manifest
from pipeline.checkpoint.tensors import load_tensors, main_file
from pipeline.checkpoint.verify import damaged_files
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointManifest
from tests.distributed.conftest import Pools
from tests.distributed.stages import move_and_train, train_steps, with_parallel

ALL_DIMS = [ParallelDims(*shape) for shape in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))]
PAIRS = list(permutations(ALL_DIMS, 2))
FEW = [
    (ParallelDims(1, 1), ParallelDims(2, 2)),
    (ParallelDims(2, 2), ParallelDims(1, 1)),
    (ParallelDims(2, 1), ParallelDims(4, 4)),
    (ParallelDims(4, 4), ParallelDims(2, 1)),
    (ParallelDims(2, 2), ParallelDims(4, 2)),
    (ParallelDims(4, 2), ParallelDims(2, 2)),
]
SAVED_AT, STEPS = 3, 5


def name(dims: ParallelDims) -> str:
    return f"{dims.world_size} ranks EP {dims.ep_size}"


def spread(tree: dict[str, Any], dims: ParallelDims) -> dict[str, Any]:
    """Four samples a micro-step over all ranks, whatever their number."""
    return with_parallel(tree, ranks=dims.world_size, ep_size=dims.ep_size, micro_batch_size=4 // dims.world_size)


class Trained:
    """Runs of STEPS steps that saved after SAVED_AT, made when first asked for."""

    def __init__(self, pools: Pools, tree_of_groups: dict[str, Any], folder: Path) -> None:
        self.pools, self.tree, self.folder = pools, tree_of_groups, folder
        self.rows: dict[tuple[ParallelDims, int, str], list[dict[str, Any]]] = {}

    def __call__(self, dims: ParallelDims, number: int, precision: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = self.folder / f"{dims.world_size}-{dims.ep_size}-{number}-{precision}"
        key = dims, number, precision
        if key not in self.rows:
            tree = spread(self.tree | {"deepspeed": f"ds_configs/{precision}_zero1.json"}, dims)
            pool = self.pools[dims.world_size]
            self.rows[key] = pool.run(train_steps, tree, number, folder, STEPS, SAVED_AT)[0]["rows"][SAVED_AT:]
        return folder, self.rows[key]


@pytest.fixture(scope="module")
def trained(pools: Pools, tree_of_groups: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(pools, tree_of_groups, tmp_path_factory.mktemp("trained"))


def saved_optimizer(folder: Path) -> SavedOptimizer:
    manifest = read_manifest(folder, CheckpointManifest)
    plan = ExpertPlan.model_validate(manifest.expert_plan)
    return SavedOptimizer(folder, plan, ParallelDims.that_saved(manifest))


def full(optimizer: SavedOptimizer, key: str, field: str) -> torch.Tensor:
    """All of a parameter's elements, whatever ranks saved them."""
    group, ep_rank, _ = optimizer.layout.index[key]
    entry = next(e for e in optimizer.layout.group(group, ep_rank).entries if e.key == key)
    target = torch.empty(entry.numel)
    optimizer.copy(key, field, 0, target)
    return target


def same_optimizer(ours: Path, theirs: Path, except_for: int = 0) -> None:
    """Weights, masters and both moments are equal, bit by bit, for each parameter under its global number.

    But for so many numbers of masters and moments, which may differ by a millionth of their parameter's largest.
    """
    a, b = saved_optimizer(ours), saved_optimizer(theirs)
    assert set(a.layout.index) == set(b.layout.index)
    others = 0
    for key in b.layout.index:
        for field in ("fp32", "exp_avg", "exp_avg_sq"):
            found, expected = full(a, key, field), full(b, key, field)
            within = 1e-6 * expected.abs().max().item() if except_for else 0.0
            torch.testing.assert_close(found, expected, rtol=0, atol=within, msg=f"{key} {field}")
            others += int((found != expected).sum())
            assert expected.abs().sum() > 0, (key, field)
    assert others <= except_for
    same_model_files(ours, theirs)


def same_model_files(ours: Path, theirs: Path) -> None:
    names = {path.name for path in theirs.glob("*model_states.pt")}
    assert {path.name for path in ours.glob("*model_states.pt")} == names
    for file in names:
        mine, other = load_tensors(ours / file), load_tensors(theirs / file)
        mine, other = mine.get("module", mine), other.get("module", other)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)


def move(
    pools: Pools, trained: Trained, pair: tuple[ParallelDims, ParallelDims], number: int, precision: str, target: Path
) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    source, destination = pair
    folder, expected = trained(source, number, precision)
    tree = spread(trained.tree | {"deepspeed": f"ds_configs/{precision}_zero1.json"}, destination)
    rows = pools[destination.world_size].run(move_and_train, tree, number, folder, target, STEPS)[0]
    return folder / f"step{SAVED_AT:06d}", rows, expected


def check_pair(
    pools: Pools, trained: Trained, pair: tuple[ParallelDims, ParallelDims], number: int, precision: str, target: Path
) -> None:
    source, rows, expected = move(pools, trained, pair, number, precision, target)
    if number == 1:
        same_optimizer(target / source.name, source)
    else:
        same_model_files(target / source.name, source)
        mine, theirs = (
            load_tensors(folder / "expp_rank_0_mp_rank_00_optim_states.pt")["optimizer"]["state"]
            for folder in (target / source.name, source)
        )
        plan = saved_optimizer(source).plan
        assert len(theirs) == len(plan.moe_layers) + len(plan.classifier_layers)
        for index, state in theirs.items():
            assert all(torch.equal(mine[index][field], value) for field, value in state.items())
    assert [row["step"] for row in rows] == [SAVED_AT + 1, STEPS]
    tolerance = {"rel": 1e-5, "abs": 1e-6} if precision == "fp32" else {"rel": 2e-2, "abs": 1e-3}
    for row, other in zip(rows, expected, strict=True):
        assert (row["lr"], row["samples"]) == (other["lr"], other["samples"])
        for loss, value in other["loss"].items():
            assert row["loss"][loss] == pytest.approx(value, **tolerance), loss


@pytest.mark.parametrize("pair", FEW, ids=lambda pair: f"{name(pair[0])} to {name(pair[1])}")
@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_resumed_on_other_ranks_the_optimizer_is_exact_and_losses_follow(
    pools: Pools, trained: Trained, pair: tuple[ParallelDims, ParallelDims], number: int, tmp_path: Path
) -> None:
    check_pair(pools, trained, pair, number, "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name(pair[0])} to {name(pair[1])}")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_every_topology_resumes_on_every_other(
    pools: Pools,
    trained: Trained,
    pair: tuple[ParallelDims, ParallelDims],
    number: int,
    precision: str,
    tmp_path: Path,
) -> None:
    check_pair(pools, trained, pair, number, precision, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "bf16_offload"])
def test_bf16_masters_and_moments_are_exact_on_other_ranks(
    pools: Pools, trained: Trained, tmp_path: Path, precision: str
) -> None:
    check_pair(pools, trained, (ParallelDims(2, 2), ParallelDims(4, 2)), 1, precision, tmp_path / "up")
    check_pair(pools, trained, (ParallelDims(4, 2), ParallelDims(1, 1)), 1, precision, tmp_path / "down")
    # The routers' 352 elements do not divide by three, so that DeepSpeed pads them.
    check_pair(pools, trained, (ParallelDims(3, 1), ParallelDims(2, 2)), 1, precision, tmp_path / "from padding")
    check_pair(pools, trained, (ParallelDims(2, 2), ParallelDims(3, 1)), 1, precision, tmp_path / "to padding")


def test_a_checkpoint_of_an_offloaded_optimizer_resumes_in_memory_and_back(
    pools: Pools, trained: Trained, tmp_path: Path
) -> None:
    """Both hold the same, but are other classes of DeepSpeed's, with other paddings."""
    dims = ParallelDims(2, 2)
    for saved, resumed in (("bf16", "bf16_offload"), ("bf16_offload", "bf16")):
        folder, expected = trained(dims, 1, saved)
        tree = spread(trained.tree | {"deepspeed": f"ds_configs/{resumed}_zero1.json"}, dims)
        rows = pools[2].run(move_and_train, tree, 1, folder, tmp_path / saved, STEPS)[0]
        assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


def test_zero_2_gives_what_zero_1_gives_and_resumes_on_other_ranks(
    pools: Pools, trained: Trained, tmp_path: Path
) -> None:
    alone, both = ParallelDims(1, 1), ParallelDims(2, 1)
    folder, expected = trained(both, 1, "bf16")
    tree = spread(trained.tree | {"deepspeed": "ds_configs/bf16_zero2.json"}, both)
    rows = pools[2].run(train_steps, tree, 1, tmp_path / "zero2", STEPS, SAVED_AT)[0]["rows"][SAVED_AT:]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    # Their shares of a rank end elsewhere, and torch's fused AdamW rounds the last elements of a share, fewer than a
    # vector register's 16, otherwise than those before: masters and moments, experts and routers, two ranks.
    last_ones = 3 * 2 * 2 * 15
    same_optimizer(tmp_path / "zero2" / f"step{SAVED_AT:06d}", folder / f"step{SAVED_AT:06d}", except_for=last_ones)
    moved = spread(trained.tree | {"deepspeed": "ds_configs/bf16_zero2.json"}, alone)
    pools[1].run(move_and_train, moved, 1, tmp_path / "zero2", tmp_path / "moved", STEPS)
    same_optimizer(tmp_path / "moved" / f"step{SAVED_AT:06d}", tmp_path / "zero2" / f"step{SAVED_AT:06d}")


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
def test_resize_writes_what_those_ranks_would_have_saved_and_they_resume_from_it(
    pools: Pools, trained: Trained, number: int, tmp_path: Path
) -> None:
    source, _ = trained(ParallelDims(2, 2), number, "fp32")
    folder, tag = tmp_path / "stage", f"step{SAVED_AT:06d}"
    shutil.copytree(source, folder)
    target = resize(folder / tag, ParallelDims(4, 2))
    assert target.name == f"{tag}-ranks4-ep2"
    assert (folder / "latest").read_text() == target.name
    assert damaged_files(target) == []
    # What four ranks save that have loaded the checkpoint themselves: shapes, paddings, mappings, all.
    _, rows, _ = move(pools, trained, (ParallelDims(2, 2), ParallelDims(4, 2)), number, "fp32", tmp_path / "native")
    native = tmp_path / "native" / tag
    names = {path.name for path in native.glob("*.pt")}
    assert {path.name for path in target.glob("*.pt")} == names
    key = "optimizer_state_dict" if number == 1 else "optimizer"
    for file in sorted(name for name in names if "optim_states" in name):
        ours, theirs = (load_tensors(path / file)[key] for path in (target, native))
        assert_equal(ours, theirs, file)
    assert load_tensors(target / main_file())["dp_world_size"] == 4
    same_model_files(target, native)
    tree = spread(trained.tree, ParallelDims(4, 2))
    resumed = pools[4].run(move_and_train, tree, number, folder, tmp_path / "again", STEPS)[0]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Nested dicts, lists and tensors are equal, bit by bit."""
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(theirs):
            assert_equal(ours[index], value, f"{where}[{index}]")
    elif not hasattr(theirs, "cur_scale"):  # a loss scaler has no equality
        assert ours == theirs, where

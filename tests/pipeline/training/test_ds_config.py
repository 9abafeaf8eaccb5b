"""Each combination of DeepSpeed's settings is either tested to be right or refused in one line that says what to use.

What is accepted here is what tests/distributed/test_parity.py and test_buckets.py train with.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.stages import find_stage
from pipeline.training.ds_config import BatchShape, batch_shape, check_zero, fill_ds_config, read_ds_config
from tests.helpers.tiny import parse_run, run_tree

ROOT = Path(__file__).parents[3]
MATRIX = list(itertools.product(("fp32", "bf16", "fp16"), (0, 1, 2, 3), (False, True)))


def write_config(folder: Path, precision: str, zero: int, overlap: bool, **changes: Any) -> Path:
    config: dict[str, Any] = {"zero_optimization": {"stage": zero, "overlap_comm": overlap}}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "bf16":
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    path = folder / "ds.json"
    path.write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize(("precision", "zero", "overlap"), MATRIX)
def test_the_matrix_is_accepted_or_refused_with_what_to_use(
    precision: str, zero: int, overlap: bool, tmp_path: Path
) -> None:
    path = write_config(tmp_path, precision, zero, overlap)
    if precision != "fp16" and zero in (1, 2) and not overlap:
        assert read_ds_config(path)["zero_optimization"]["stage"] == zero
        return
    with pytest.raises(UserError) as error:
        read_ds_config(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    what = "use bf16" if precision == "fp16" else "use 1" if zero not in (1, 2) else "set it to false"
    assert what in line


def test_zero_2_is_for_equal_ranks_and_only_the_cpu_takes_what_is_offloaded(tmp_path: Path) -> None:
    config = read_ds_config(write_config(tmp_path, "bf16", 2, False))
    check_zero(config, 1)
    with pytest.raises(UserError, match="use --set parallel.ep_size=1"):
        check_zero(config, 2)
    for offload in ({"offload_optimizer": {"device": "nvme"}}, {"offload_param": {"device": "cpu"}}):
        path = write_config(tmp_path, "bf16", 1, False, zero_optimization={"stage": 1, **offload})
        with pytest.raises(UserError, match='only "offload_optimizer": {"device": "cpu"}'):
            read_ds_config(path)


@pytest.mark.parametrize(
    ("left_out", "needed"), [("data_types", "grad_accum_dtype"), ("communication_data_type",) * 2]
)
def test_bf16_must_accumulate_and_be_summed_over_ranks_in_fp32(left_out: str, needed: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, "bf16", 1, False, **{left_out: None})
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if value}))
    with pytest.raises(UserError, match=f'"{needed}": "fp32"'):
        read_ds_config(path)


def test_every_config_that_ships_is_accepted_and_trained_with() -> None:
    shipped = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
    # Those of tests/distributed/test_resume.py and test_elastic.py.
    assert shipped == ["bf16_offload_zero1.json", "bf16_zero1.json", "bf16_zero2.json", "fp32_zero1.json"]
    for name in shipped:
        read_ds_config(ROOT / "ds_configs" / name)


def test_stage_2_runs_without_zero_in_fp32(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path), "tiny.yaml")
    config = read_ds_config(ROOT / "ds_configs" / "bf16_zero1.json")
    filled = fill_ds_config(config, run, find_stage(run, 2), ParallelDims(2, 1), BatchShape(4, 1))
    assert not {"bf16", "data_types", "zero_optimization"} & filled.keys()


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 12, 512])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 64])
def test_any_number_of_ranks_takes_the_whole_batch_with_the_fewest_empty_samples(
    batch: int, ranks: int, tmp_path: Path
) -> None:
    tree = run_tree(tmp_path)
    tree["stage1"] |= {"global_batch_size": batch, "tokens": 32 * batch}
    run = parse_run(tree, "tiny.yaml")
    shape = batch_shape(run, run.stage1, ranks, "cpu")
    a_step = ranks * shape.micro_batch * shape.accumulation
    assert a_step >= batch
    assert a_step == -(-batch // ranks) * ranks
    assert shape.micro_batch <= 32  # 1,024 tokens on a CPU


def test_a_micro_batch_above_a_ranks_share_is_refused(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path, parallel={"micro_batch_size": 5}), "tiny.yaml")
    with pytest.raises(UserError, match="5 is more than the 4 samples per rank of .* use at most 4, or auto"):
        batch_shape(run, run.stage1, 2, "cpu")
    assert batch_shape(run, run.stage1, 1, "cpu") == BatchShape(5, 2)  # 8 samples in 2 micro-steps of 5

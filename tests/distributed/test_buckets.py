"""Reduction in buckets of any size neither hangs nor changes a result. Run: pytest tests/distributed"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, with_parallel

ROOT = Path(__file__).parent.parent.parent
BUCKETS = [100, 3_000, 20_000, 500_000_000]  # elements: from less than one weight to DeepSpeed's own default
CASES = [
    (2, 2, "fp32"),
    pytest.param(4, 4, "fp32", marks=pytest.mark.slow),
    pytest.param(2, 2, "bf16", marks=pytest.mark.slow),
    (4, 4, "bf16"),
    (4, 4, "bf16_offload"),
]


@pytest.mark.parametrize(("ranks", "ep_size", "precision"), CASES)
def test_unequal_experts_in_buckets_of_any_size(
    pools: Pools, tree_of_groups: dict[str, Any], tmp_path: Path, ranks: int, ep_size: int, precision: str
) -> None:
    results = []
    for bucket in BUCKETS:
        config = json.loads((ROOT / "ds_configs" / f"{precision}_zero1.json").read_text())
        config["zero_optimization"]["reduce_bucket_size"] = bucket
        path = tmp_path / f"{bucket}.json"
        path.write_text(json.dumps(config))
        spread = with_parallel(tree_of_groups, ranks=ranks, ep_size=ep_size, micro_batch_size=4 // ranks) | {
            "deepspeed": str(path)
        }
        results.append(pools[ranks].run(train_steps, spread, 1, tmp_path / str(bucket), 2))
    for parts in results[:-1]:
        for part, expected in zip(parts, results[-1], strict=True):
            for name, tensor in expected["weights"].items():
                torch.testing.assert_close(part["weights"][name], tensor, rtol=1e-5, atol=1e-6)

"""Ranks, groups and places. Run: pytest tests/pipeline/distributed/test_parallel_dims.py"""

import pytest

from common.errors import UserError
from pipeline.distributed.parallel_dims import ParallelDims

SHAPES = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (12, 4)]


@pytest.mark.parametrize(("world_size", "ep_size"), SHAPES)
def test_every_rank_has_its_own_place_and_each_group_holds_all_places(world_size: int, ep_size: int) -> None:
    dims = [ParallelDims(world_size, ep_size, rank) for rank in range(world_size)]
    assert all(d.num_replicas * d.ep_size == world_size for d in dims)
    assert [(d.edp_rank, d.ep_rank) for d in dims] == [
        (replica, place) for replica in range(world_size // ep_size) for place in range(ep_size)
    ]


def test_the_error_names_the_product_that_fails_and_the_fix() -> None:
    with pytest.raises(UserError) as error:
        ParallelDims(4, 3)
    assert str(error.value) == (
        "parallel.ep_size: 3 does not divide the number of ranks, 4; "
        "start a multiple of 3 ranks, or use --set parallel.ep_size=1"
    )


@pytest.mark.parametrize(("world_size", "ep_size"), [(3, 2), (6, 4), (2, 4), (0, 1), (1, 0)])
def test_what_does_not_divide_is_one_line(world_size: int, ep_size: int) -> None:
    with pytest.raises(UserError, match=f"parallel.ep_size: {ep_size} does not divide .* {world_size};") as error:
        ParallelDims(world_size, ep_size)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"ranks {world_size}, ep_size {ep_size}: the ranks must be a multiple"):
        ParallelDims.from_options(world_size, ep_size)


def test_the_suggested_ep_size_divides() -> None:
    with pytest.raises(UserError, match="parallel.ep_size=2$"):
        ParallelDims(6, 4)
    assert ParallelDims(6, 2).num_replicas == 3


def test_shapes_are_equal_whatever_the_rank() -> None:
    dims = ParallelDims(4, 2, 3)
    assert dims == ParallelDims(4, 2)
    assert hash(dims) == hash(ParallelDims(4, 2))
    assert dims != ParallelDims(4, 4)
    assert dims.at_rank(1).ep_rank == 1
    assert dims.expert_group_name == "ep_size_2"

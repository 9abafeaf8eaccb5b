"""The ZeRO optimizer's state, found by parameter and global expert number, whichever ranks saved it.

DeepSpeed flattens a parameter group, pads it, and cuts it into equal partitions: routers over all ranks,
experts over the ranks that hold the same experts, in one group for each ep_size that layers have. Where each element
lies follows from the expert plan and :class:`ParallelDims` alone. So the state moves from one number of ranks to
another slice by slice, unchanged.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.tensors import (
    expert_file,
    load_tensors,
    main_file,
    optimizer_file,
    router_optimizer_file,
)
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.expert_plan import ExpertPlan

# The parameter groups, in pipeline.model.backbone.parameter_groups' order: routers, then experts from EXPERTS on.
ROUTERS, EXPERTS = 0, 1
FP32 = "fp32"  # the master weights; other fields are the optimizer's own, such as exp_avg
ALIGNMENT = 2  # elements; DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class Entry:
    """One parameter in a flat group.

    Attributes:
        key: its name on any number of ranks, with the expert's number in the layer.
        local_name: its name on the rank that holds it, with the expert's slot.
        start: its first element's place in the flat group.
        numel: its number of elements.
    """

    key: str
    local_name: str
    start: int
    numel: int


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group as one rank flattens it, cut into ``num_partitions`` equal partitions."""

    entries: tuple[Entry, ...]
    num_partitions: int

    @property
    def numel(self) -> int:
        """Elements without padding."""
        return sum(entry.numel for entry in self.entries)

    @property
    def partition_size(self) -> int:
        """Elements per partition, padding included."""
        alignment = ALIGNMENT * self.num_partitions
        return -(-self.numel // alignment) * alignment // self.num_partitions

    def padding(self, partition: int) -> int:
        """Elements of padding that DeepSpeed counts for a partition: all of it for the last, none before."""
        last = partition == self.num_partitions - 1
        return self.partition_size * self.num_partitions - self.numel if last else 0

    def overlaps(self, partition: int) -> Iterator[tuple[Entry, int, int, int]]:
        """(entry, first element, last + 1, place in the partition) of what a partition holds."""
        begin, end = partition * self.partition_size, (partition + 1) * self.partition_size
        for entry in self.entries:
            first, last = max(entry.start, begin), min(entry.start + entry.numel, end)
            if first < last:
                yield entry, first - entry.start, last - entry.start, first - begin


@dataclass(frozen=True)
class Shapes:
    """What the layout depends on besides the plan.

    Attributes:
        routers: name and number of elements of each router parameter.
        expert: the same for each weight of one expert.
        expert_prefixes: for each MoE layer, the start of its experts' names, up to the expert's number; empty where
            none trains.
    """

    routers: tuple[tuple[str, int], ...]
    expert: tuple[tuple[str, int], ...]
    expert_prefixes: tuple[str, ...]


class Layout:
    """Where each parameter lies in the flat groups of each rank."""

    def __init__(self, plan: ExpertPlan, shapes: Shapes, dims: ParallelDims) -> None:
        self.shapes, self.placement = shapes, list(plan.placement(dims).values())
        self.frozen = [plan.num_frozen(layer) for layer in plan.moe_layers]
        sizes = sorted({self.placement[index].dims.ep_size for index in plan.trained_moe_layers})
        # For each group, how ranks are divided for it. Routers are on every rank, as experts at ep_size 1 are.
        self.dims = [replace(dims, ep_size=1), *(replace(dims, ep_size=size) for size in sizes)]

    @cache  # noqa: B019 - lives as long as the layout
    def group(self, group: int, ep_rank: int) -> FlatGroup:
        """A parameter group as ranks flatten it whose place in the group's expert-parallel groups is ``ep_rank``."""
        if group == ROUTERS:
            parameters = [(name, name, numel) for name, numel in self.shapes.routers]
        else:
            parameters = [
                (f"{prefix}{number - 1}.{name}", f"{prefix}{slot}.{name}", numel)
                for prefix, layer, frozen in zip(self.shapes.expert_prefixes, self.placement, self.frozen, strict=True)
                if layer.dims == self.dims[group]
                for slot, number in enumerate(layer.experts[ep_rank])
                if number > frozen
                for name, numel in self.shapes.expert
            ]
        return _flat(parameters, self.dims[group].num_replicas)

    def own(self, group: int) -> FlatGroup:
        """A parameter group as this rank flattens it."""
        return self.group(group, self.dims[group].ep_rank)

    def partition(self, group: int) -> int:
        """The partition of a group that this rank holds."""
        return self.dims[group].edp_rank

    def rank(self, group: int, ep_rank: int, partition: int) -> int:
        """The rank that holds a partition."""
        return partition * self.dims[group].ep_size + ep_rank

    @cached_property
    def index(self) -> dict[str, tuple[int, int, int]]:
        """For each parameter's key: its group, the ``ep_rank`` that holds it, and its first element's place there."""
        return {
            entry.key: (group, ep_rank, entry.start)
            for group, dims in enumerate(self.dims)
            for ep_rank in range(dims.ep_size)
            for entry in self.group(group, ep_rank).entries
        }


def _flat(parameters: list[tuple[str, str, int]], num_partitions: int) -> FlatGroup:
    entries, start = [], 0
    for key, local_name, numel in parameters:
        entries.append(Entry(key, local_name, start, numel))
        start += numel
    return FlatGroup(tuple(entries), num_partitions)


class SavedOptimizer:
    """The ZeRO optimizer files of one checkpoint, mapped into memory, not read.

    Args:
        folder: the checkpoint's tag folder.
        plan: its expert plan.
        dims: of the ranks that saved it.
    """

    def __init__(self, folder: Path, plan: ExpertPlan, dims: ParallelDims) -> None:
        self.folder, self.plan, self.dims = folder, plan, dims
        self.bf16 = (folder / optimizer_file(0, bf16=True)).is_file()

    @property
    def of_routers(self) -> Path:
        """The file of a stage that trains routers alone, without ZeRO: every rank holds all of it."""
        return self.folder / router_optimizer_file()

    @cached_property
    def shapes(self) -> Shapes:
        """Sizes of the parameters, from the checkpoint's own files."""
        shapes = load_tensors(self.folder / main_file())["param_shapes"]
        routers = tuple((name, prod(shape)) for name, shape in shapes[ROUTERS].items())
        prefixes = [""] * len(self.plan.moe_layers)
        expert: tuple[tuple[str, int], ...] = ()
        for moe_layer in self.plan.trained_moe_layers:
            number = self.plan.num_frozen(self.plan.moe_layers[moe_layer])
            state = load_tensors(self.folder / expert_file(moe_layer, number))
            prefixes[moe_layer] = next(iter(state)).rpartition(".")[0].removesuffix(str(number))
            expert = tuple((name.rpartition(".")[2], tensor.numel()) for name, tensor in state.items())
        return Shapes(routers, expert, tuple(prefixes))

    @cached_property
    def layout(self) -> Layout:
        """Where everything lies in the files."""
        return Layout(self.plan, self.shapes, self.dims)

    @lru_cache(maxsize=16)  # noqa: B019 - a mapped file costs address space and a handle, not memory
    def _file(self, rank: int) -> dict[str, Any]:
        return dict(load_tensors(self.folder / optimizer_file(rank, bf16=self.bf16)))

    def _field(self, rank: int, group: int, field: str) -> Tensor:
        state = self._file(rank)["optimizer_state_dict"]
        if field == FP32:
            return state["single_partition_of_fp32_groups"][group].detach()
        return state["base_optimizer_state"]["state"][group][field]

    def copy(self, key: str, field: str, first: int, target: Tensor) -> None:
        """Fill ``target`` with a parameter's elements, beginning with element ``first``."""
        group, ep_rank, start = self.layout.index[key]
        size = self.layout.group(group, ep_rank).partition_size
        done = 0
        while done < target.numel():
            partition, offset = divmod(start + first + done, size)
            length = min(target.numel() - done, size - offset)
            source = self._field(self.layout.rank(group, ep_rank, partition), group, field)
            target[done : done + length].copy_(source[offset : offset + length])
            done += length

    def main_for(self, dims: ParallelDims) -> dict[str, Any]:
        """The checkpoint's main file as other ranks would have saved it: the schedule has a value for each group."""
        main = load_tensors(self.folder / main_file())
        groups = 1 if self.of_routers.is_file() else len(Layout(self.plan, self.shapes, dims).dims)
        schedule = {
            name: value[:1] * groups if isinstance(value, list) else value
            for name, value in main["lr_scheduler"].items()
        }
        return {**main, "dp_world_size": dims.world_size, "lr_scheduler": schedule}

    def file_for(self, dims: ParallelDims, new_tensor: Callable[[int], Tensor]) -> dict[str, Any]:
        """The optimizer file for rank ``dims.rank`` of other ranks, laid out but not filled.

        Args:
            dims: of the other ranks.
            new_tensor: makes a tensor of so many elements.
        """
        return {**self._file(0), "optimizer_state_dict": self._skeleton(dims, new_tensor)}

    def _skeleton(self, dims: ParallelDims, new_tensor: Callable[[int], Tensor]) -> dict[str, Any]:
        layout, old = Layout(self.plan, self.shapes, dims), self._file(0)["optimizer_state_dict"]
        groups = range(len(layout.dims))
        partitions, flats = [layout.partition(group) for group in groups], [layout.own(group) for group in groups]
        paddings = [flat.padding(partition) for flat, partition in zip(flats, partitions, strict=True)]
        # DeepSpeed's bf16 optimizer stores the fp32 weights with their padding, its fp32 one without.
        lean = [0 if self.bf16 else padding for padding in paddings]
        base = old["base_optimizer_state"]
        states = {
            group: {
                field: new_tensor(flat.partition_size) if value.ndim else value.clone()
                for field, value in base["state"][min(group, EXPERTS)].items()
            }
            for group, flat in enumerate(flats)
            if base["state"]
        }
        alignment = "param_alignment_paddings"  # between parameters of a group; we ask for none
        return {
            **old,
            **({alignment: [[0] * len(flat.entries) for flat in flats]} if alignment in old else {}),
            "base_optimizer_state": {"state": states, "param_groups": _param_groups(base["param_groups"], layout)},
            "single_partition_of_fp32_groups": [
                new_tensor(flat.partition_size - less) for flat, less in zip(flats, lean, strict=True)
            ],
            "group_paddings": paddings,
            "partition_count": [flat.num_partitions for flat in flats],
            "param_slice_mappings": [_slices(flat, part) for flat, part in zip(flats, partitions, strict=True)],
        }

    def fill(self, state: dict[str, Any], dims: ParallelDims) -> None:
        """Copy the values into the tensors that :meth:`file_for` laid out, one parameter at a time.

        Args:
            state: the ``optimizer_state_dict`` of that file.
            dims: as given to :meth:`file_for`.
        """
        layout = Layout(self.plan, self.shapes, dims)
        for group, weights in enumerate(state["single_partition_of_fp32_groups"]):
            moments = state["base_optimizer_state"]["state"].get(group, {})
            fields = {FP32: weights} | {name: tensor for name, tensor in moments.items() if tensor.ndim}
            for name, tensor in moments.items():
                if not tensor.ndim:  # such as the number of steps
                    tensor.copy_(self._field(0, min(group, EXPERTS), name))
            flat = layout.own(group)
            for name, tensor in fields.items():
                end = 0
                for entry, first, last, place in flat.overlaps(layout.partition(group)):
                    end = place + last - first
                    self.copy(entry.key, name, first, tensor[place:end])
                tensor[end:] = 0.0

    def state_for(self, dims: ParallelDims) -> dict[str, Any]:
        """The filled optimizer file of rank ``dims.rank`` of other ranks."""
        file = self.file_for(dims, torch.empty)
        self.fill(file["optimizer_state_dict"], dims)
        return file


def _param_groups(saved: list[dict[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """The optimizer's groups; DeepSpeed finds the experts' process groups by the names of their parameter groups."""
    experts = [
        {**saved[EXPERTS], "name": dims.expert_group_name, "params": [EXPERTS + index]}
        for index, dims in enumerate(layout.dims[EXPERTS:])
    ]
    return [saved[ROUTERS], *experts]


def _slices(flat: FlatGroup, partition: int) -> "OrderedDict[str, Any]":
    """DeepSpeed's record of which part of which parameter a partition holds."""
    from deepspeed.utils.tensor_fragment import fragment_address

    return OrderedDict(
        (entry.local_name, fragment_address(numel=last - first, start=place))
        for entry, first, last, place in flat.overlaps(partition)
    )

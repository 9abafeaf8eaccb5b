"""DeepSpeed's seam for how files are written and read.

Expert files are numbered by the model: file 0 is the layer's first new expert. DeepSpeed numbers them by
rank and slot; the engine below translates. It also translates an optimizer that was saved by another
number of ranks.
"""

import re
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import ZERO_STAGE
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from pipeline.checkpoint.optimizer_state import SavedOptimizer, Topology
from pipeline.checkpoint.tensors import expert_file, load_tensors, router_optimizer_file, save_tensors
from pipeline.model.backbone import moe_layers

_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_EXPERT_KEY = re.compile(r"(\.deepspeed_experts\.)(\d+)(\.)")
_ZERO_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_ROUTER_OPTIMIZER_FILE = re.compile(r"expp_rank_\d+_mp_rank_00_optim_states\.pt$")


class AtomicCheckpointEngine(TorchCheckpointEngine):
    """Writes atomically, hashes, keeps only what trained; reads what any number of ranks has written.

    Args:
        model: the engine's module.
        topology: the ranks that run now.
    """

    def __init__(self, config: Any, model: nn.Module, topology: Topology) -> None:
        super().__init__(config)
        self.layers = moe_layers(model)
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.topology = topology
        self.saved_by_others: SavedOptimizer | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; frozen experts and empty slots have none.

        An error is kept in ``error``, and what follows is not written: other ranks wait in DeepSpeed's barriers.
        """
        if self.error is not None:
            return
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if match:
            layer, number = int(match[1]), self._file_number(int(match[1]), int(match[2]))
            if number is None or not self.layers[layer].experts_train:
                return
            target = target.with_name(expert_file(layer, number))
            state_dict = _renumber(state_dict, number)
        elif "module" in state_dict:
            module = {name: tensor for name, tensor in state_dict["module"].items() if name in self.trained}
            state_dict = {**state_dict, "module": module}
        try:
            self.files[target.name] = save_tensors(_without_enum(state_dict), target)
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; what :meth:`save` leaves out is empty, what other ranks saved is what this one needs."""
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if match:
            layer, slot = int(match[1]), int(match[2])
            number = self._file_number(layer, slot)
            if number is None or not self.layers[layer].experts_train:
                return {}
            return _renumber(load_tensors(target.with_name(expert_file(layer, number))), slot)
        if _ROUTER_OPTIMIZER_FILE.search(path):  # all ranks hold the same
            return load_tensors(target.with_name(router_optimizer_file(0)))
        if self.saved_by_others is None:
            return load_tensors(target)
        zero_file = _ZERO_FILE.search(path)
        if zero_file:
            return self.saved_by_others.state_for(int(zero_file[1]), self.topology)
        return {**load_tensors(target), "dp_world_size": self.topology.ranks}

    def _file_number(self, layer: int, slot: int) -> int | None:
        """DeepSpeed's rank * slots + slot to the model's own number; None for an empty slot."""
        rank, local = divmod(slot, self.layers[layer].num_local_experts)
        numbers = self.layers[layer].placement[rank]
        return numbers[local] - 1 if local < len(numbers) else None


def _without_enum(state: dict[str, Any]) -> dict[str, Any]:
    """ZeRO's stage as a number: Python before 3.11.4 pickles an enum's member as a call, which is not loaded."""
    optimizer = state.get("optimizer_state_dict")
    if not isinstance(optimizer, dict) or ZERO_STAGE not in optimizer:
        return state
    return {**state, "optimizer_state_dict": {**optimizer, ZERO_STAGE: int(optimizer[ZERO_STAGE])}}


def _renumber(state: dict[str, Any], number: int) -> dict[str, Any]:
    return {_EXPERT_KEY.sub(rf"\g<1>{number}\g<3>", name): tensor for name, tensor in state.items()}

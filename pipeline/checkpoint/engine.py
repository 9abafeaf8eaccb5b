"""How checkpoint files are written and read: what DeepSpeed calls a checkpoint engine.

Expert files are numbered by the model: file 0 is the layer's first new expert. DeepSpeed numbers them by
rank and slot; the engine below translates. It also converts an optimizer that another number of ranks saved.
"""

import re
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import ZERO_STAGE
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from pipeline.checkpoint.optimizer_state import SavedOptimizer
from pipeline.checkpoint.tensors import expert_file, load_tensors, router_optimizer_file, save_tensors
from pipeline.checkpoint.weights import SELECTION_BIAS
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.backbone import moe_layers
from pipeline.records.checkpoint import FileEntry

_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_EXPERT_KEY = re.compile(r"(\.deepspeed_experts\.)(\d+)(\.)")
_ZERO_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_ROUTER_OPTIMIZER_FILE = re.compile(r"expp_rank_\d+_mp_rank_00_optim_states\.pt$")


class AtomicCheckpointEngine(TorchCheckpointEngine):
    """Writes each file atomically and hashes it, keeps only what changes; reads what any number of ranks wrote.

    Args:
        config: DeepSpeed's own, of the engine.
        model: the engine's module.
        dims: of the ranks that run now.

    Attributes:
        saved_by_others: the optimizer to convert while loading; None if the same ranks saved it.
        files: size and sha256 of each file that this rank wrote, by name.
        error: the first error of a save; None if there was none.
    """

    def __init__(self, config: Any, model: nn.Module, dims: ParallelDims) -> None:
        super().__init__(config)
        self.layers = moe_layers(model)
        self.kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.kept |= {name for name, _ in model.named_buffers() if name.endswith(SELECTION_BIAS)}
        self.dims = dims
        self.saved_by_others: SavedOptimizer | None = None
        self.files: dict[str, FileEntry] = {}
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; frozen experts and empty slots have none.

        An error is kept in ``error`` instead of raised, because other ranks wait in DeepSpeed's barriers. No more
        files are then written.
        """
        if self.error is not None:
            return
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if match:
            layer, number = int(match[1]), self._file_number(int(match[1]), int(match[2]))
            if number is None or not self.layers[layer].trains(number + 1):
                return
            target = target.with_name(expert_file(layer, number))
            state_dict = _renumber(state_dict, number)
        elif _ROUTER_OPTIMIZER_FILE.search(path) and target.name != router_optimizer_file():
            return  # rank 0 writes the same
        elif "module" in state_dict:
            module = {name: tensor for name, tensor in state_dict["module"].items() if name in self.kept}
            state_dict = {**state_dict, "module": module}
        try:
            self.files[target.name] = save_tensors(_without_enum(state_dict), target)
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file. What :meth:`save` leaves out is empty; an optimizer saved by other ranks is converted."""
        target = Path(path)
        match = _EXPERT_FILE.search(path)
        if match:
            layer, slot = int(match[1]), int(match[2])
            number = self._file_number(layer, slot)
            if number is None or not self.layers[layer].trains(number + 1):
                return {}
            return _renumber(load_tensors(target.with_name(expert_file(layer, number))), slot)
        if _ROUTER_OPTIMIZER_FILE.search(path):
            return load_tensors(target.with_name(router_optimizer_file()))
        if self.saved_by_others is None:
            return load_tensors(target)
        zero_file = _ZERO_FILE.search(path)
        if zero_file:
            return self.saved_by_others.state_for(self.dims.at_rank(int(zero_file[1])))
        return self.saved_by_others.main_for(self.dims)

    def _file_number(self, layer: int, slot: int) -> int | None:
        """The model's own number of the expert that DeepSpeed numbers rank * slots + slot; None for an empty slot."""
        rank, local = divmod(slot, self.layers[layer].num_local_experts)
        numbers = self.layers[layer].placement.experts[rank]
        return numbers[local] - 1 if local < len(numbers) else None


def _without_enum(state: dict[str, Any]) -> dict[str, Any]:
    """ZeRO's stage as a number: Python before 3.11.4 pickles an enum as a function call, which we refuse to load."""
    optimizer = state.get("optimizer_state_dict")
    if not isinstance(optimizer, dict) or ZERO_STAGE not in optimizer:
        return state
    return {**state, "optimizer_state_dict": {**optimizer, ZERO_STAGE: int(optimizer[ZERO_STAGE])}}


def _renumber(state: dict[str, Any], number: int) -> dict[str, Any]:
    return {_EXPERT_KEY.sub(rf"\g<1>{number}\g<3>", name): tensor for name, tensor in state.items()}

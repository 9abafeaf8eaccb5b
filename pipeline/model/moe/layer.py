"""The MoE layer that replaces a decoder layer's MLP."""

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from pipeline.distributed.process_group import take_timeout
from pipeline.model.expert_plan import LayerPlacement
from pipeline.model.moe.dispatch import Exchange
from pipeline.model.moe.experts import LocalExperts, projections
from pipeline.model.moe.router import Router
from pipeline.model.moe.rows import Rows, block_of_rows, sorted_choices


class _RoutedExperts(nn.Module):
    """Router and local experts, under the names that DeepSpeed's engine and native checkpoints use."""

    def __init__(self, gate: Router, experts: LocalExperts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.ep_group: Any = None

    def _set_ep_group(self, group: Any) -> None:
        self.ep_group = group


class MoELayer(MoE):
    """Expert 0 is the original MLP, frozen and on every rank; the new experts are spread over a group of ranks.

    It is a subclass of DeepSpeed's MoE so that the engine creates the groups, reduces the gradients and writes the
    expert files. Router, dispatch and experts are our own.

    Args:
        mlp: the decoder layer's MLP; it becomes ``base_mlp``.
        num_experts: N_l, expert 0 included.
        top_k: K.
        placement: which ranks hold its new experts, and which rank this is.
        has_classifier: whether the layer has a routing classifier.
        old_experts: see :class:`pipeline.model.moe.router.Router`.
        has_selection_bias: whether its router has a selection bias.
        classifies_sequences: whether its classifier, if any, gives all tokens of a sequence one class.
    """

    def __init__(
        self,
        mlp: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        placement: LayerPlacement,
        has_classifier: bool,
        old_experts: tuple[int, ...] = (1,),
        has_selection_bias: bool = False,
        classifies_sequences: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not MoE's own: it would build TopKGate and capacity-bound experts
        self.num_experts = num_experts
        self.dims = placement.dims
        self.ep_size = self.dims.ep_size
        self.num_local_experts = max(len(numbers) for numbers in placement.experts)
        self.expert_group_name = self.dims.expert_group_name
        self.placement = placement
        self.local_numbers = placement.local
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        # DeepSpeed treats a weight as an expert's if its name contains "expert", so this name does not.
        self.base_mlp = mlp
        gate = projections(mlp)[0]
        router = Router(
            gate.in_features, num_experts, top_k, has_classifier, old_experts, has_selection_bias, classifies_sequences
        )
        router = router.to(gate.weight.device)
        experts = LocalExperts(mlp, len(self.local_numbers), self.num_local_experts, self.expert_group_name)
        self.deepspeed_moe = _RoutedExperts(router, experts)
        self.experts_train = False
        num_slots = self.num_local_experts
        slots = [rank * num_slots + slot for rank, held in enumerate(placement.experts) for slot in range(len(held))]
        by_place = [0, *(number for held in placement.experts for number in held)]
        self.place_E: Tensor | None  # of each expert in the order of ranks and slots; None if it is that of numbers
        place = None if by_place == sorted(by_place) else torch.tensor(by_place, device=gate.weight.device).argsort()
        self.register_buffer("place_E", place, persistent=False)
        self.slots_N: Tensor  # for each place after expert 0's, the slot among those of all ranks
        self.register_buffer("slots_N", torch.tensor(slots, device=gate.weight.device), persistent=False)

    @property
    def router(self) -> Router:
        """The router, with its classifier if it has one."""
        return self.deepspeed_moe.gate

    def trains(self, number: int) -> bool:
        """Whether this new expert trains, if experts do: those of earlier expansions are frozen."""
        return self.experts_train and number >= self.router.old_experts[-1]

    @property
    def local_experts(self) -> LocalExperts:
        """The experts of this rank."""
        return self.deepspeed_moe.experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the expert-parallel groups unless another layer has; DeepSpeed's engine calls this."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
            take_timeout(
                groups._get_expert_parallel_group(self.expert_group_name),
                groups._get_expert_data_parallel_group(self.expert_group_name),
            )
        self.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(self.expert_group_name))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape [..., D] to [..., D]: y = sum_i w_i E_i(x) (MoE-LPR, arXiv 2408.11396, section 3.1, eq. 2)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.router(x_TD, hidden_states.shape[0] if hidden_states.ndim == 3 else 1)
        choices_C, rows_C, counts_E = sorted_choices(routing, self.place_E, block_of_rows(x_TD))
        exchange, counts = self._exchange(counts_E, x_TD.requires_grad)
        rows = Rows.of(choices_C, rows_C, routing.active_TK, sum(counts))
        rows_AD, experts = rows.take(x_TD), self.local_experts
        if exchange is None:
            base_AD, *batches = rows_AD.split([counts[0], *experts.batch_sizes(rows_AD, counts[1:])])
            outputs = [self.base_mlp(base_AD), *experts(batches, counts[1:])]
        else:
            base_AD, new_AD = rows_AD.split([counts[0], sum(counts[1:])])
            travelling = exchange.send(new_AD)
            base = self.base_mlp(base_AD)  # while rows travel
            arrived_AD, counts = exchange.arrived(travelling), exchange.slot_counts
            new = experts(arrived_AD.split(experts.batch_sizes(arrived_AD, counts)), counts)
            outputs = [base, exchange.send_back(torch.cat(new))]
        return rows.sum_by_token(torch.cat(outputs), routing.weights_TK).view(hidden_states.shape)

    def _exchange(self, counts_E: Tensor, input_needs_gradient: bool) -> tuple[Exchange | None, list[int]]:
        """How rows go to the ranks that hold their experts, if there are several, and the rows of each expert."""
        if self.ep_size == 1:
            return None, counts_E.tolist()  # the layer's only wait for the device
        assert self.deepspeed_moe.ep_group is not None, "set_deepspeed_parallelism was not called"
        needs_gradient = torch.is_grad_enabled() and (self.experts_train or input_needs_gradient)
        shape = self.ep_size, self.num_local_experts
        return Exchange.plan(counts_E, self.slots_N, shape, self.deepspeed_moe.ep_group, needs_gradient)

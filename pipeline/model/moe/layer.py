"""The MoE layer that replaces a decoder layer's MLP."""

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import take_timeout
from pipeline.model.moe.dispatch import Exchange
from pipeline.model.moe.experts import LocalExperts, in_whole_blocks, projections
from pipeline.model.moe.router import Router, Routing


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
    """Expert 0 is the original MLP, frozen and on every rank; the new experts are spread over ``ep_size`` ranks.

    It is a subclass of DeepSpeed's MoE so that the engine creates the groups, reduces the gradients and writes the
    expert files. Router, dispatch and experts are our own.

    Args:
        mlp: the decoder layer's MLP; it becomes ``base_mlp``.
        num_experts: N_l, expert 0 included.
        top_k: K.
        placement: for each rank of the expert-parallel group, the numbers of its experts (1 and up).
        dims: how ranks are divided, and which one this is.
        has_classifier: whether the layer has a routing classifier.
    """

    def __init__(
        self,
        mlp: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        placement: list[list[int]],
        dims: ParallelDims,
        has_classifier: bool,
    ) -> None:
        nn.Module.__init__(self)  # not MoE's own: it would build TopKGate and capacity-bound experts
        assert len(placement) == dims.ep_size
        self.num_experts = num_experts
        self.ep_size = dims.ep_size
        self.num_local_experts = max(len(numbers) for numbers in placement)
        self.expert_group_name = dims.expert_group_name
        self.placement = placement
        self.local_numbers = placement[dims.ep_rank]
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        # DeepSpeed treats a weight as an expert's if its name contains "expert", so this name does not.
        self.base_mlp = mlp
        gate = projections(mlp)[0]
        router = Router(gate.in_features, num_experts, top_k, has_classifier).to(gate.weight.device)
        experts = LocalExperts(mlp, len(self.local_numbers), self.num_local_experts, self.expert_group_name)
        self.deepspeed_moe = _RoutedExperts(router, experts)
        self.experts_train = False

    @property
    def router(self) -> Router:
        """The router, with its classifier if it has one."""
        return self.deepspeed_moe.gate

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
        routing = self.router(x_TD)
        token_A, expert_A, weight_A = _assignments(routing)
        counts_E = torch.bincount(expert_A, minlength=routing.scores_TE.shape[1])
        num_base = int(counts_E[0])
        sizes = [num_base, len(token_A) - num_base]
        base_AD, new_AD = x_TD.index_select(0, token_A).split(sizes)
        outputs = in_whole_blocks(self.base_mlp, base_AD), self._new_experts(new_AD, counts_E[1:])
        # With K = 2 at most two rows are added to zero, in any order: so a GPU's result is repeatable too.
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for output_AD, tokens, weights in zip(outputs, token_A.split(sizes), weight_A.split(sizes), strict=True):
            y_TD = y_TD.index_add_(0, tokens, output_AD.float() * weights.unsqueeze(-1))
        return y_TD.to(hidden_states.dtype).view(hidden_states.shape)

    def _new_experts(self, rows_AD: Tensor, counts_N: Tensor) -> Tensor:
        """Rows sorted by expert, computed by the ranks that hold the experts."""
        if self.ep_size == 1:
            return self.local_experts(rows_AD, counts_N.tolist())
        assert self.deepspeed_moe.ep_group is not None, "set_deepspeed_parallelism was not called"
        counts_RS = counts_N.new_zeros(self.ep_size, self.num_local_experts)
        for rank, numbers in enumerate(self.placement):
            if numbers:
                counts_RS[rank, : len(numbers)] = counts_N[numbers[0] - 1 : numbers[-1]]
        needs_gradient = torch.is_grad_enabled() and (self.experts_train or rows_AD.requires_grad)
        exchange = Exchange.plan(counts_RS, self.deepspeed_moe.ep_group, needs_gradient)
        return exchange.combine(self.local_experts(exchange.dispatch(rows_AD), exchange.slot_counts))


def _assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, weight) of every active choice, sorted by expert, then token."""
    active = routing.active_TK.flatten()
    top_k = routing.ids_TK.shape[1]
    chosen = active.nonzero().squeeze(1)
    expert_A, order = routing.ids_TK.flatten()[chosen].sort(stable=True)
    chosen = chosen[order]
    return chosen // top_k, expert_A, routing.weights_TK.flatten()[chosen]

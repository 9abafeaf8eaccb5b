"""How long one MoE layer takes, as a multiple of two dense MLP calls on the same tokens.

    python -m benchmarks.moe_layer [--tokens 2048 --hidden 576 ...] [--device cuda] [--json FILE]

Two dense calls are the least that top-2 routing must compute, so 1.00 would be routing for nothing.
Ours stands beside transformers' Mixtral block and DeepSpeed's MoE layer, all with the same sizes, the
same tokens and a random router. Benchmarks/README.md says what the columns mean.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measuring import (
    CPU,
    DTYPES,
    WALL,
    Taken,
    Turn,
    add_options,
    check_options,
    in_turns,
    milliseconds,
    ratio,
)
from pipeline.distributed.device import device_name


@dataclass(frozen=True)
class Sizes:
    """The layer's sizes: T tokens, D hidden, F intermediate, E experts of which a token takes K."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer; ``trains`` says which weights get a gradient."""

    name: str
    trains: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """Medians over the rounds; a ratio is the median of each round's ratio to two dense MLP calls."""

    name: str
    trains: str
    dtype: str
    forward_wall_ms: float
    forward_wall_ratio: float
    forward_cpu_ratio: float
    both_wall_ms: float
    both_wall_ratio: float
    both_cpu_ratio: float


def dense_mlp(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama MLP."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    # The heads only let transformers accept any hidden size; an MLP has none.
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return LlamaMLP(config).to(device, dtype)


def two_dense(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Contender:
    """The yardstick: two MLPs on every token."""
    pair = nn.ModuleList([dense_mlp(sizes, dtype, device) for _ in range(2)])
    return Contender("two dense MLP calls", "both", pair, lambda x: pair[0](x) + pair[1](x))


def ours(name: str, trains: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Contender:
    """This project's layer on one rank. ``trains``: all, new experts (stage 1) or router alone (stage 2)."""
    from pipeline.distributed.parallel_dims import ParallelDims
    from pipeline.model.expert_plan import LayerPlacement
    from pipeline.model.moe import MoELayer

    layer = MoELayer(
        dense_mlp(sizes, dtype, device),
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        placement=LayerPlacement(ParallelDims(world_size=1, ep_size=1), [list(range(1, sizes.experts))]),
        has_classifier=False,
    )
    with torch.no_grad():
        for parameter in layer.local_experts.parameters():
            nn.init.normal_(parameter, std=0.02)
    layer.router.reset(torch.Generator(device).manual_seed(1))
    layer.base_mlp.requires_grad_(trains == "all")
    layer.experts_train = trains != "router"
    layer.local_experts.requires_grad_(layer.experts_train)
    return Contender(name, trains, layer, layer)


def mixtral(implementation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Contender:
    """transformers' Mixtral block with one of its experts implementations."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    block.to(device, dtype)
    return Contender(f"transformers Mixtral, {implementation}", "all", block, lambda x: block(x.unsqueeze(0)))


def deepspeed_moe(name: str, drop_tokens: bool, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Contender:
    """DeepSpeed's own layer. Its gate pads every expert to the busiest one's load, or drops what is over capacity."""
    from deepspeed.moe.layer import MoE

    layer = MoE(
        sizes.hidden, dense_mlp(sizes, dtype, device), sizes.experts, k=sizes.top_k, drop_tokens=drop_tokens
    ).to(device)
    layer.set_deepspeed_parallelism()
    return Contender(name, "all", layer, lambda x: layer(x)[0])


def contenders(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """All that are compared, the yardstick first."""
    made = [
        two_dense(sizes, dtype, device),
        ours("ours, stage 1 (expert 0 frozen)", "new experts, router", sizes, dtype, device),
        ours("ours, stage 2 (all experts frozen)", "router", sizes, dtype, device),
        ours("ours, nothing frozen", "all", sizes, dtype, device),
        mixtral("eager", sizes, dtype, device),
        mixtral("grouped_mm", sizes, dtype, device),
    ]
    if sizes.top_k <= 2:
        made.append(deepspeed_moe("DeepSpeed MoE, dropless", False, sizes, dtype, device))
        made.append(deepspeed_moe("DeepSpeed MoE, as it comes (drops)", True, sizes, dtype, device))
    return made


def run_once(contender: Contender, x_TD: Tensor, upstream_TD: Tensor | None) -> None:
    """One forward, and its backward too where there is an upstream gradient."""
    x_TD = x_TD.detach().requires_grad_(upstream_TD is not None)
    with torch.set_grad_enabled(upstream_TD is not None):
        output = contender.call(x_TD)
    if upstream_TD is not None:
        output.backward(upstream_TD.view_as(output))


def measure(sizes: Sizes, dtype_name: str, device: torch.device, rounds: int) -> list[Result]:
    """Every contender once a round."""
    torch.manual_seed(0)
    dtype = DTYPES[dtype_name]
    with device:  # where weights are made, as making them on a CPU takes long
        everyone = contenders(sizes, dtype, device)
    x_TD, upstream_TD = (torch.randn(sizes.tokens, sizes.hidden, device=device).to(dtype) for _ in range(2))
    turns = [
        Turn(
            c.name,
            {"forward": partial(run_once, c, x_TD, None), "both": partial(run_once, c, x_TD, upstream_TD)},
            partial(c.module.zero_grad, set_to_none=True),
        )
        for c in everyone
    ]
    times = in_turns(turns, rounds, device, dtype_name)
    return [summarise(c, dtype_name, times[c.name], times[everyone[0].name]) for c in everyone]


def summarise(
    contender: Contender, dtype: str, taken: dict[str, list[Taken]], yardstick: dict[str, list[Taken]]
) -> Result:
    """Medians of what was taken, in both kinds of pass and on both clocks."""
    return Result(
        contender.name,
        contender.trains,
        dtype,
        milliseconds(taken["forward"]),
        ratio(taken["forward"], yardstick["forward"], WALL),
        ratio(taken["forward"], yardstick["forward"], CPU),
        milliseconds(taken["both"]),
        ratio(taken["both"], yardstick["both"], WALL),
        ratio(taken["both"], yardstick["both"], CPU),
    )


def print_table(results: list[Result]) -> None:
    """One dtype's results."""
    print(f"\n{results[0].dtype:38}{'trains':22}{'---- forward ----':>24}{'- forward + backward -':>26}")
    print(f"{'':60}{'ms':>8}{'wall':>8}{'CPU':>8}{'ms':>10}{'wall':>8}{'CPU':>8}")
    for r in results:
        print(
            f"{r.name:38}{r.trains:22}{r.forward_wall_ms:8.1f}{r.forward_wall_ratio:8.2f}{r.forward_cpu_ratio:8.2f}"
            f"{r.both_wall_ms:10.1f}{r.both_wall_ratio:8.2f}{r.both_cpu_ratio:8.2f}"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=4, help="of the layer, expert 0 included")
    parser.add_argument("--top-k", type=int, default=2)
    add_options(parser, rounds=15)
    arguments = parser.parse_args()
    check_options(parser, arguments, ("tokens", "hidden", "intermediate", "top_k"))
    if arguments.experts < max(2, arguments.top_k):
        parser.error(f"--experts {arguments.experts}: give at least 2, and no fewer than --top-k {arguments.top_k}")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON that was asked for."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the process group's backend follows what is visible
    from common.files import write_json
    from pipeline.distributed.process_group import join, leave

    ranks = join()
    device = ranks.device
    sizes = Sizes(arguments.tokens, arguments.hidden, arguments.intermediate, arguments.experts, arguments.top_k)
    where = device_name(device)
    print(f"{sizes}\n{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print("Time as a multiple of two dense MLP calls on the same tokens; every router is random.")
    print("In ours, expert 0 is the dense model's own MLP: frozen in stage 1, where the new experts train.")
    results = []
    for dtype in arguments.dtypes:
        results += measure(sizes, dtype, device, arguments.rounds)
        print_table([r for r in results if r.dtype == dtype])
    if arguments.json:
        report = {"sizes": asdict(sizes), "device": where, "threads": torch.get_num_threads()}
        write_json(arguments.json, {**report, "torch": torch.__version__, "results": [asdict(r) for r in results]})
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

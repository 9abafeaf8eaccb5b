"""The MLPs that a training step is measured with, in one decoder model: the floors, ours, and what others do.

All share one frozen Llama: before a contender's turn its blocks take the places of the MLPs. Expert 0 of each is the
model's own MLP, frozen, wherever a block can have one expert frozen and others not.
"""

import argparse
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.measuring import check_options
from benchmarks.step_blocks import TOP_K, FirstOutput, LoopOverExperts, TwoDense, TwoDenseAsRouted
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method.stage import GlobalBatch, MicroBatch, Stage, mean_next_token_loss
from pipeline.model.backbone import decoder_layers
from pipeline.model.expert_plan import LayerPlacement
from pipeline.model.moe import MoELayer, collect_routings

SPREAD = 0.02  # of random weights


@dataclass(frozen=True)
class Sizes:
    """The model's sizes, and one rank's tokens of a step: ``tokens``, in samples of ``sequence``."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    experts: int
    tokens: int
    sequence: int

    @property
    def samples(self) -> int:
        """Samples per rank and step."""
        return self.tokens // self.sequence

    def llama(self) -> LlamaConfig:
        """The dense model's config; with the default sizes that of SmolLM2-135M."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 3 if self.heads % 3 == 0 else self.heads,
            max_position_embeddings=max(8192, self.sequence),
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            initializer_range=SPREAD,
        )


SMOLLM2 = {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "vocab": 49152, "sequence": 256}


def check_sizes(parser: argparse.ArgumentParser, arguments: argparse.Namespace, why_two: str) -> None:
    """End with one line if sizes of a model, under the names of :class:`Sizes`, are wrong.

    Args:
        parser: of the command line.
        arguments: as parsed.
        why_two: why a layer has two experts at the least.
    """
    check_options(parser, arguments, (*SMOLLM2, "tokens"))
    if arguments.experts < 2:
        parser.error(f"--experts {arguments.experts}: give at least 2, {why_two}")
    if arguments.hidden % (2 * arguments.heads):
        parser.error(f"--hidden {arguments.hidden}: give an even multiple of --heads {arguments.heads}")
    if arguments.tokens % arguments.sequence:
        parser.error(f"--tokens {arguments.tokens}: give a multiple of --sequence {arguments.sequence}")


@dataclass(frozen=True)
class Contender:
    """A model's blocks, one per decoder layer, and the losses that it trains with.

    Attributes:
        name: of its row.
        trains: the weights that get a gradient.
        floor: the name of the row that its times are divided by.
        blocks: one per layer.
        stage: whose losses; None for the next token's alone.
    """

    name: str
    trains: str
    floor: str
    blocks: nn.ModuleList
    stage: Stage | None = None


class Bench:
    """A frozen model whose MLPs can be exchanged, and one batch of random tokens, half of its samples old.

    Args:
        sizes: of both.
        dtype: of the weights.
        device: where they lie.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.sizes, self.dtype, self.device = sizes, dtype, device
        with device:  # where weights are made, as making them on a CPU takes long
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(sizes.llama(), dtype=dtype)
        nn.Module.to(self.model, device)
        self.model.requires_grad_(False).train()
        self.layers = decoder_layers(self.model)
        self.mlps: list[Any] = [layer.mlp for layer in self.layers]
        ids = torch.randint(sizes.vocab, (sizes.samples, sizes.sequence + 1), device=device)
        self.ids_BL, self.labels_BL = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        old_B = torch.arange(sizes.samples, device=device) % 2 == 1
        self.group_T = torch.where(old_B, 0, 1).repeat_interleave(sizes.sequence)
        self.batch = GlobalBatch(sizes.samples, sizes.sequence, int((self.group_T == 0).sum()))

    def new_mlp(self) -> nn.Module:
        """A trained MLP of the model's shape."""
        with self.device:
            mlp = LlamaMLP(self.sizes.llama()).to(self.dtype)
        return randomised(mlp)

    def install(self, blocks: nn.ModuleList) -> None:
        """Put a contender's blocks into the model."""
        for layer, block in zip(self.layers, blocks, strict=True):
            layer.mlp = block

    def losses(self, stage: Stage | None) -> Tensor:
        """Forward with the blocks that are in place; returns the weighted sum of a stage's losses."""
        with collect_routings(self.model) as routings:
            logits_BLV = self.model(input_ids=self.ids_BL, use_cache=False).logits
        counts_T = torch.ones_like(self.group_T, dtype=torch.bool)
        micro = MicroBatch(logits_BLV, routings, self.labels_BL, counts_T, self.group_T, self.batch.samples, 1)
        if stage is None:
            return mean_next_token_loss(micro, self.batch)
        return torch.stack([weight * loss for loss, weight in stage.losses(micro, self.batch).values()]).sum()

    def turn(self, contender: Contender) -> tuple[Callable[[], object], Callable[[], object]]:
        """What a contender's turn runs, forward and backward, and what prepares it."""

        def prepare() -> None:
            contender.blocks.zero_grad(set_to_none=True)
            self.install(contender.blocks)

        return lambda: self.losses(contender.stage).backward(), prepare


def randomised(module: nn.Module) -> nn.Module:
    """The module, with normal weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=SPREAD)
    return module


def floor(bench: Bench, name: str, trains: str) -> Contender:
    """Two dense MLPs per layer; the second trains, or if ``trains`` is "nothing", neither."""
    shift = bench.sizes.hidden if trains == "nothing" else 0
    blocks = [TwoDense(mlp, bench.new_mlp(), 0 if index else shift) for index, mlp in enumerate(bench.mlps)]
    for block in blocks:
        block.second.requires_grad_(trains != "nothing")
    return Contender(name, trains, name, nn.ModuleList(blocks).to(bench.device))


def ours(bench: Bench, name: str, of: str, stage: Stage, classifier_layers: int) -> Contender:
    """This project's layers on one rank, with a stage's losses and what it freezes."""
    blocks = []
    for index, mlp in enumerate(bench.mlps):
        layer = MoELayer(
            mlp,
            num_experts=bench.sizes.experts,
            top_k=TOP_K,
            placement=LayerPlacement(ParallelDims(world_size=1, ep_size=1), [list(range(1, bench.sizes.experts))]),
            has_classifier=stage.has_classifiers and index < classifier_layers,
        )
        randomised(layer.local_experts)
        layer.router.reset(torch.Generator(bench.device).manual_seed(index))
        blocks.append(layer)
    contender = Contender(name, "new experts, router" if stage.trains_experts else "router", of,
                          nn.ModuleList(blocks).to(bench.device), stage)  # fmt: skip
    stage.train_only(contender.blocks)
    return contender


def as_routed(bench: Bench, name: str, of: str, routed: Contender) -> Contender:
    """The floor with as many frozen rows per layer as ``routed`` sends to expert 0 in its first forward."""
    bench.install(routed.blocks)
    with torch.no_grad(), collect_routings(bench.model) as routings:
        bench.model(input_ids=bench.ids_BL, use_cache=False)
    rows = [int((routing.ids_TK == 0).sum()) for routing in routings]
    second = [bench.new_mlp() for _ in rows]
    blocks = [TwoDenseAsRouted(*three) for three in zip(bench.mlps, second, rows, strict=True)]
    share = sum(rows) / (TOP_K * bench.sizes.tokens * len(rows))
    return Contender(name, f"{1 - share:.0%} of the rows", of, nn.ModuleList(blocks))


def loop(bench: Bench, of: str, stage: Stage) -> Contender:
    """The references' loop, with our router and losses, so that the loop alone differs."""
    blocks = []
    for index, mlp in enumerate(bench.mlps):
        block = LoopOverExperts([mlp, *(bench.new_mlp() for _ in range(bench.sizes.experts - 1))], bench.sizes.hidden)
        block.router.to(bench.device).reset(torch.Generator(bench.device).manual_seed(index))
        blocks.append(block)
    return Contender("the references' loop", "new experts, router", of, nn.ModuleList(blocks), stage)


def mixtral(bench: Bench, implementation: str, of: str) -> Contender:
    """transformers' Mixtral blocks, with the next token's loss alone; their experts are one weight, so all train."""
    config = MixtralConfig(
        hidden_size=bench.sizes.hidden,
        intermediate_size=bench.sizes.intermediate,
        num_local_experts=bench.sizes.experts,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = implementation
    with bench.device:
        blocks = [randomised(MixtralSparseMoeBlock(config)).to(bench.dtype) for _ in bench.mlps]
    return Contender(f"transformers Mixtral, {implementation}", "all", of, nn.ModuleList(blocks))


def deepspeed_moe(bench: Bench, of: str) -> Contender:
    """DeepSpeed's own dropless layers, with the next token's loss alone."""
    from deepspeed.moe.layer import MoE

    blocks = []
    for _ in bench.mlps:
        moe = MoE(bench.sizes.hidden, bench.new_mlp(), bench.sizes.experts, k=TOP_K, drop_tokens=False)
        with redirect_stdout(StringIO()):  # it prints that it makes a group
            moe.to(bench.device).set_deepspeed_parallelism()
        moe.deepspeed_moe.experts.deepspeed_experts[0].requires_grad_(False)
        blocks.append(FirstOutput(moe))
    return Contender("DeepSpeed MoE, dropless", "new experts, router", of, nn.ModuleList(blocks))


def contenders(bench: Bench, stages: dict[int, Stage], classifier_layers: int) -> list[Contender]:
    """All that are compared, floors first."""
    least, frozen = "floor of stage 1: two dense MLPs", "floor of stage 2: two dense MLPs"
    stage1 = ours(bench, "ours, stage 1", least, stages[1], 0)
    return [
        floor(bench, least, "one MLP"),
        as_routed(bench, "floor of stage 1, rows as routed", least, stage1),
        stage1,
        loop(bench, least, stages[1]),
        mixtral(bench, "eager", least),
        mixtral(bench, "grouped_mm", least),
        deepspeed_moe(bench, least),
        floor(bench, frozen, "nothing"),
        ours(bench, "ours, stage 2", frozen, stages[2], classifier_layers),
    ]


def trained_parameters(contender: Contender) -> list[nn.Parameter]:
    """A contender's parameters that train."""
    return [parameter for parameter in contender.blocks.parameters() if parameter.requires_grad]

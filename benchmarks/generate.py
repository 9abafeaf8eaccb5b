"""How long a generated token takes with an exported mixture, as a multiple of the dense model's.

    python -m benchmarks.generate [--layers 30 --hidden 576 ...] [--device cuda] [--json FILE]

Both are loaded by transformers as anybody would; weights are random. Benchmarks/README.md says what the rows mean.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measuring import (
    CPU,
    DTYPES,
    WALL,
    Turn,
    add_options,
    check_options,
    in_turns,
    milliseconds,
    ratio,
)
from common.files import write_json
from common.text_table import aligned
from pipeline.distributed.device import device_name
from pipeline.export.export import export
from pipeline.model.backbone import install_moe_layers, load_dense, moe_layers
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.moe import collect_routings
from pipeline.model.moe.router import classify

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of transformers
ALWAYS = 0  # the number of a hidden state that is positive for each token


@dataclass(frozen=True)
class Sizes:
    """Of the model: layers, D hidden, F intermediate, heads, V, E experts in each layer; of the work: the rest."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int
    batch: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: milliseconds per step of the batch, and ratios to the dense model's."""

    name: str
    dtype: str
    step_ms: float
    wall_ratio: float
    cpu_ratio: float


def save_dense(sizes: Sizes, folder: Path, dtype: torch.dtype) -> Path:
    """A random Llama, each of whose tokens has one positive number in common."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.model.embed_tokens.weight.data[:, ALWAYS] = 100.0
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def save_mixture(dense: Path, sizes: Sizes, folder: Path, dtype: torch.dtype, *, classified: bool) -> Path:
    """The exported mixture.

    Args:
        dense: the dense model's folder.
        sizes: of the mixture.
        folder: the folder to make.
        dtype: of the weights.
        classified: whether each layer has a classifier, which sends each token to expert 0.
    """
    layers = range(sizes.layers) if classified else []
    plan = ExpertPlan.first_expansion(
        [sizes.experts] * sizes.layers, old=["old"], new=["new"], top_k=2, classifier_layers=list(layers)
    )
    model = load_dense(dense, dtype)
    install_moe_layers(model, plan, classifiers=classified)
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(model):
        layer.router.reset(generator)
        for expert in layer.local_experts.experts:
            expert.copy_mlp(layer.base_mlp.state_dict())
        if layer.router.classifier is not None:
            layer.router.classifier.weight.zero_()[0, ALWAYS] = 1.0  # old; the row of new languages stays zero
    ids = np.arange(sizes.batch * sizes.prompt).reshape(sizes.batch, -1) % sizes.vocabulary
    with collect_routings(model) as routings:
        model(input_ids=torch.from_numpy(ids), use_cache=False)
    classes = [classify(one.class_logits_TC) for one in routings if one.class_logits_TC is not None]
    assert not classes or not torch.cat(classes).any(), "each token is one of old languages"
    export(model, plan, dense, folder, dtype, ids)
    return folder


def load(folder: Path, dtype: torch.dtype, device: torch.device, implementation: str = "") -> PreTrainedModel:
    """As anybody loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval().to(device)
    if implementation:
        model.set_experts_implementation(implementation)
    return model


def generate(model: PreTrainedModel, sizes: Sizes, device: torch.device) -> None:
    """A batch's tokens, greedily, with a cache."""
    ids_BL = torch.arange(sizes.batch * sizes.prompt, device=device).view(sizes.batch, -1) % sizes.vocabulary
    call: Any = model.generate
    call(
        ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=sizes.new_tokens,
        min_new_tokens=sizes.new_tokens, do_sample=False, pad_token_id=0,
    )  # fmt: skip


def measure(sizes: Sizes, dtype_name: str, device: torch.device, rounds: int) -> list[Result]:
    """Every model once a round."""
    dtype = DTYPES[dtype_name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense = save_dense(sizes, folder / "dense", dtype)
        models = {"dense": load(dense, dtype, device)}
        for name, classified in (("top 2", False), ("expert 0 by classifier", True)):
            mixture = save_mixture(dense, sizes, folder / f"mixture{classified}", dtype, classified=classified)
            for implementation in IMPLEMENTATIONS:
                models[f"{name}, {implementation}"] = load(mixture, dtype, device, implementation)
    turns = [Turn(name, {"generate": partial(generate, model, sizes, device)}) for name, model in models.items()]
    taken = {name: parts["generate"] for name, parts in in_turns(turns, rounds, device, dtype_name).items()}
    return [
        Result(
            name, dtype_name, milliseconds(one) / sizes.new_tokens,
            ratio(one, taken["dense"], WALL), ratio(one, taken["dense"], CPU),
        )
        for name, one in taken.items()
    ]  # fmt: skip


def table(results: list[Result]) -> str:
    """One dtype's results."""
    rows = [[results[0].dtype, "ms per step", "wall", "CPU"]]
    rows += [[one.name, f"{one.step_ms:.1f}", f"{one.wall_ratio:.2f}", f"{one.cpu_ratio:.2f}"] for one in results]
    return aligned(rows, numbers_from=1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--experts", type=int, default=3, help="of each layer, expert 0 included")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    add_options(parser, rounds=7)
    arguments = parser.parse_args()
    check_options(parser, arguments, ("layers", "heads", "kv_heads", "vocabulary", "batch", "prompt", "new_tokens"))
    if arguments.hidden % arguments.heads:
        parser.error(f"--hidden {arguments.hidden}: give a multiple of --heads {arguments.heads}")
    if arguments.experts < 2:
        parser.error(f"--experts {arguments.experts}: give at least 2")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON that was asked for."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    sizes = Sizes(
        arguments.layers, arguments.hidden, arguments.intermediate, arguments.heads, arguments.kv_heads,
        arguments.vocabulary, arguments.experts, arguments.batch, arguments.prompt, arguments.new_tokens,
    )  # fmt: skip
    where = device_name(device)
    print(f"{sizes}\n{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print("Time of a step of the batch, prompt included, as a multiple of the dense model's; weights are random.")
    results = []
    for dtype in arguments.dtypes:
        found = measure(sizes, dtype, device, arguments.rounds)
        print(f"\n{table(found)}")
        results += found
    if arguments.json:
        report = {"sizes": asdict(sizes), "device": where, "threads": torch.get_num_threads()}
        write_json(arguments.json, {**report, "torch": torch.__version__, "results": [asdict(r) for r in results]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

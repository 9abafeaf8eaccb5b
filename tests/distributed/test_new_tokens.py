"""Rows of new tokens train on real ranks, and old rows do not. Run: pytest tests/distributed/test_new_tokens.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from common.errors import UserError
from pipeline.checkpoint.store import complete_tags
from pipeline.checkpoint.tensors import load_tensors, main_file
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.estimate.device import Device
from pipeline.estimate.report import Estimate
from pipeline.evaluation.checkpoints import Scored, load_model
from pipeline.method.stages import find_stage
from pipeline.method.upcycle import load_upcycled
from pipeline.model.backbone import load_dense
from pipeline.records.evaluation import Evaluation
from pipeline.records.run_folder import EVALUATION_FILE
from pipeline.run.context import RunContext
from pipeline.training.sample_order import Batch, stage_order
from tests.distributed.conftest import Pools
from tests.distributed.observed import held_bytes
from tests.distributed.rounds import Model, run
from tests.distributed.stages import stage_inputs, train_steps, with_parallel
from tests.distributed.test_elastic import Trained, check_pair, name
from tests.distributed.test_parity import merged
from tests.helpers.extended import ADDED, FIRST, extended_tree, prepared_extended_run
from tests.helpers.tiny import parse_run, save_corpus

Tree = dict[str, Any]
ROWS, HEAD_ROWS = "model.embed_tokens.new_rows", "lm_head.new_rows"
FAMILIES = {"llama": [ROWS, HEAD_ROWS], "gemma3": [ROWS]}  # by family, the parameters of new rows: gemma3's are tied
SPREAD = [(1, 1, 4), (2, 1, 2), (2, 2, 2)]  # ranks, ep_size, micro-batch


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tree(family: str, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run of an extended tokenizer, done up to upcycling."""
    return prepared_extended_run(tmp_path_factory.mktemp(family), family)


def on(tree: Tree, ranks: int, ep_size: int, micro_batch: int) -> Tree:
    return with_parallel(tree, ranks=ranks, ep_size=ep_size, micro_batch_size=micro_batch)


def loaded(tree: Tree, *checkpoints: Path) -> dict[str, torch.Tensor]:
    """The parameters of the model that evaluation loads: as upcycled, or with checkpoints."""
    context = RunContext(parse_run(tree, "x"))
    dims = ParallelDims(1, 1)
    scored = Scored("stage", checkpoints, {}, has_classifiers=len(checkpoints) > 1)
    model = load_model(scored, context.untrained, torch.float32, dims, torch.device("cpu"))
    return dict(model.named_parameters())


def first_batch(tree: Tree, folder: Path, steps: int = 1) -> Batch:
    """The samples of stage 1's first steps."""
    inputs = stage_inputs(with_parallel(tree), 1, folder, Ranks(0, 1, torch.device("cpu")))
    order = stage_order(inputs.store, inputs.run.data, inputs.stage, inputs.plan, inputs.run.seed)
    return order.batch(0, steps * inputs.stage.settings.global_batch_size)


def assert_close_to_the_largest(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest element: a small one is a sum in which large ones cancel."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_new_rows_start_as_the_mean_of_their_pieces_rows(family: str, tree: Tree) -> None:
    context = RunContext(parse_run(tree, "x"))
    new_tokens = context.planned.encoders.new_tokens
    assert new_tokens is not None
    assert (new_tokens.first, new_tokens.count) == (FIRST, ADDED)
    dense, found = load_dense(context.dense, torch.float32), loaded(tree)
    weights = {ROWS: dense.get_input_embeddings().weight, HEAD_ROWS: dense.get_output_embeddings().weight}
    for row, pieces in enumerate(new_tokens.pieces):
        assert len(pieces) > 1
        for parameter in FAMILIES[family]:
            expected = weights[parameter][list(pieces)].mean(0)
            torch.testing.assert_close(found[parameter][row], expected, rtol=1e-6, atol=1e-7)
    assert (HEAD_ROWS in found) == (HEAD_ROWS in FAMILIES[family])


@pytest.mark.parametrize(("ranks", "ep_size", "micro_batch"), SPREAD)
def test_the_first_gradient_of_new_rows_is_that_of_a_plain_torch_loop(
    pools: Pools, family: str, tree: Tree, tmp_path: Path, ranks: int, ep_size: int, micro_batch: int
) -> None:
    """While experts are copies, and without a balance loss, the mixture is the dense model with more rows."""
    tree = on({**tree, "stage1": tree["stage1"] | {"balance_weight": 0.0}}, ranks, ep_size, micro_batch)
    found = merged(pools[ranks].run(train_steps, tree, 1, tmp_path, 1), "gradients")

    batch = first_batch(tree, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tree["model"]["path"], dtype=torch.float32)
    plain.resize_token_embeddings(FIRST + ADDED, mean_resizing=False)
    start = loaded(tree)
    plain_rows = {ROWS: plain.get_input_embeddings().weight, HEAD_ROWS: plain.get_output_embeddings().weight}
    with torch.no_grad():
        for parameter in FAMILIES[family]:
            plain_rows[parameter][FIRST:] = start[parameter]
    logits = plain(input_ids=torch.from_numpy(batch.ids)).logits
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten()).backward()
    assert (batch.ids >= FIRST).mean() > 0.1
    for parameter in FAMILIES[family]:
        expected = plain_rows[parameter].grad
        assert expected is not None
        assert_close_to_the_largest(found[parameter], expected[FIRST:])
        assert expected[FIRST:].abs().max() > 1e-4


@pytest.mark.parametrize(("ranks", "ep_size", "micro_batch"), SPREAD)
def test_new_rows_train_in_stage_1_alone_and_old_rows_never(
    pools: Pools, family: str, tree: Tree, tmp_path: Path, ranks: int, ep_size: int, micro_batch: int
) -> None:
    spread = on(tree, ranks, ep_size, micro_batch)
    parts = pools[ranks].run(train_steps, spread, 1, tmp_path / "stage1", 3, 3)
    assert all(part["frozen_unchanged"] for part in parts)
    assert set(FAMILIES[family]) <= set(parts[0]["trained"])
    first = tmp_path / "stage1" / "step000003"
    parts = pools[ranks].run(train_steps, spread, 2, tmp_path / "stage2", 3, 3, False, first)
    assert all(part["frozen_unchanged"] for part in parts)
    assert set(FAMILIES[family]) <= set(parts[0]["frozen"])

    start, after_1, after_2 = (
        loaded(tree), loaded(tree, first), loaded(tree, first, tmp_path / "stage2" / "step000003")
    )  # fmt: skip
    dense = load_dense(Path(tree["model"]["path"]), torch.float32)
    for old in ("model.embed_tokens.weight", *(["lm_head.weight"] if HEAD_ROWS in FAMILIES[family] else [])):
        for weights in (start, after_1, after_2):
            assert torch.equal(weights[old], dense.get_parameter(old)), old
    moved = {rows: (after_1[rows] != start[rows]).any(1) for rows in FAMILIES[family]}
    if HEAD_ROWS in moved:
        assert moved[HEAD_ROWS].all()
        seen = set(first_batch(tree, tmp_path, 3).ids.flatten().tolist())
        assert moved[ROWS].tolist() == [FIRST + row in seen for row in range(ADDED)]
        assert moved[ROWS].sum() > 10
    else:
        assert moved[ROWS].all()  # they are the head's too
    for rows in FAMILIES[family]:
        assert torch.equal(after_2[rows], after_1[rows]), rows
    # A checkpoint of stage 1 has them, one of stage 2 has what it trains alone.
    files = [tmp_path / "stage1" / "step000003", tmp_path / "stage2" / "step000003"]
    stored = [set(load_tensors(folder / main_file())["module"]) for folder in files]
    assert [{ROWS, HEAD_ROWS} & names for names in stored] == [set(FAMILIES[family]), set()]


def test_ranks_agree_on_losses_and_on_the_gradient_of_new_rows(
    pools: Pools, family: str, tree: Tree, tmp_path: Path
) -> None:
    results = []
    for ranks, ep_size, micro_batch in SPREAD:
        spread = on(tree, ranks, ep_size, micro_batch)
        results.append(pools[ranks].run(train_steps, spread, 1, tmp_path / f"{ranks}-{ep_size}", 3))
    expected = merged(results[0], "gradients")
    for parts in results[1:]:
        found = merged(parts, "gradients")
        for rows in FAMILIES[family]:
            assert_close_to_the_largest(found[rows], expected[rows])
        for ours, theirs in zip(parts[0]["rows"], results[0][0]["rows"], strict=True):
            assert ours["loss"]["next_token"] == pytest.approx(theirs["loss"]["next_token"], rel=1e-5)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumed_they_are_the_same_to_the_bit(
    pools: Pools, tree: Tree, tmp_path: Path, ranks: int, precision: str
) -> None:
    spread = on(tree, ranks, ranks, 4 // ranks) | {"deepspeed": f"ds_configs/{precision}_zero1.json"}
    straight = pools[ranks].run(train_steps, spread, 1, tmp_path / "straight", 4)
    pools[ranks].run(train_steps, spread, 1, tmp_path / "resumed", 2, 2)
    assert complete_tags(tmp_path / "resumed") == ["step000002"]
    resumed = pools[ranks].run(train_steps, spread, 1, tmp_path / "resumed", 4, None, True)
    for ours, expected in zip(resumed, straight, strict=True):
        assert ours["rows"] == expected["rows"][2:]
        assert ours["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(ours["weights"][name], tensor) for name, tensor in expected["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(ours["optimizer"], expected["optimizer"], strict=True))


PAIRS = [(ParallelDims(2, 2), ParallelDims(1, 1)), (ParallelDims(1, 1), ParallelDims(2, 1))]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name(pair[0])} to {name(pair[1])}")
def test_resumed_on_other_ranks_their_moments_are_exact(
    pools: Pools, tree: Tree, tmp_path: Path, pair: tuple[ParallelDims, ParallelDims]
) -> None:
    check_pair(pools, Trained(pools, tree, tmp_path / "trained"), pair, 1, "fp32", tmp_path / "moved")


def test_logits_of_old_ids_are_the_dense_models(tree: Tree) -> None:
    context = RunContext(parse_run(tree, "x"))
    ids = torch.arange(FIRST).view(3, -1)
    dense = load_dense(context.dense, torch.float32)
    mixture = load_upcycled(context.upcycled, context.plan, torch.float32).eval()
    with torch.no_grad():
        expected, found = dense(input_ids=ids).logits, mixture(input_ids=ids).logits
    assert found.shape[-1] == FIRST + ADDED
    torch.testing.assert_close(found[..., :FIRST], expected, rtol=1e-5, atol=1e-5)
    parity = context.folder.manifest("upcycle").figures["parity"]
    assert parity["holds"]
    assert parity["tokens"] > 100


def test_a_further_expansion_keeps_the_tokenizer_and_what_its_rows_have_learned(pools: Pools, tmp_path: Path) -> None:
    spread = {"parallel": {"ranks": 2, "ep_size": 2, "micro_batch_size": 2}}
    tree = extended_tree(tmp_path, name="g1", similarity={"tokens": 300}, **spread)
    first = run(pools, tree, 2)
    corpus = save_corpus(tmp_path / "text", ["tr"])
    data = tree["data"]
    further = {
        **{key: value for key, value in tree.items() if key != "model"},
        "name": "g2",
        "base": str(tmp_path / "runs" / "g1"),
        "data": {**data, "old": {**data["old"], **data["new"]}, "new": {"tr": {"path": str(corpus["tr"])}}},
        "experts": tree["experts"] | {"counts": [2, 1, 2, 2], "copy_of": "most_used"},
    }
    second = run(pools, further, 2)
    before, after = Model.of(first), Model.of(second)
    upcycled = loaded(tree)
    assert before.rest.keys() == after.rest.keys() >= {ROWS, HEAD_ROWS}
    for parameter, weight in after.rest.items():
        assert torch.equal(weight, before.rest[parameter]), parameter
    assert all((before.rest[rows] != upcycled[rows]).any() for rows in (ROWS, HEAD_ROWS))
    # The second run starts from what the first came to, and reads text by the same tokens.
    scores = [Evaluation.load(context.folder / EVALUATION_FILE) for context in (first, second)]
    for language in ("en", "el", "hu"):
        bits = [found.sets[language].bits_per_character for found in scores]
        assert bits[1]["base"] == bits[0]["stage2"]
    assert scores[1].parameters["stage1_trained"] < scores[0].parameters["stage1_trained"]
    other = {**further, "name": "g3", "model": {"path": tree["model"]["path"]}}
    with pytest.raises(UserError, match=r"model\.tokenizer: None is not .*tokenizer, which base.run .* has; .*leave"):
        run(pools, other, 2)


@pytest.mark.parametrize("number", [1, 2], ids=["stage1", "stage2"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_estimate_counts_what_ranks_hold_of_new_rows(
    pools: Pools, tree: Tree, tmp_path: Path, number: int, ranks: int
) -> None:
    spread = on(tree, ranks, 1, 2) | {"deepspeed": "ds_configs/bf16_zero1.json"}
    held = pools[ranks].run(held_bytes, spread, number, tmp_path)
    estimate = Estimate(parse_run(spread, "x"), ranks, Device(), ep_size=1)
    memory = estimate.memory(find_stage(estimate.run, number))
    for kind in ("weights", "master weights", "moments", *(["gradients"] if number == 1 else [])):
        found = max(rank[kind] for rank in held)
        assert memory[kind] == pytest.approx(found, rel=0.02), kind

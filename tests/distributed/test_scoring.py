"""Bits per character are the model's, whatever the ranks. Run: pytest tests/distributed/test_scoring.py"""

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from common.files import sha256_file
from pipeline.checkpoint import verify
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.checkpoints import Scored, check_weights, load_model
from pipeline.evaluation.evaluate import paired_change
from pipeline.evaluation.scoring import LENGTH_MULTIPLE, document_windows, score_sets
from pipeline.model.backbone import load_dense
from pipeline.records.evaluation import Change
from pipeline.run.context import RunContext
from tests.distributed.conftest import Pools
from tests.distributed.stages import train_steps, with_parallel
from tests.helpers.tiny import parse_run, prepared_run

WINDOW = 16
LONG = 1024  # longer than a document


def score_moe(ranks: Ranks, tree: dict[str, Any], ep_size: int, *, together: bool = True) -> dict[str, Any]:
    run = parse_run({**tree, "parallel": {"ranks": ranks.world_size, "ep_size": ep_size}}, "x")
    steps = RunContext(run)
    dims = ParallelDims(ranks.world_size, ep_size, ranks.rank)
    untrained = Scored("untrained", (), {})
    model = load_model(untrained, steps.untrained, torch.float32, dims, ranks.device)
    names, groups = list(run.data.sets), {name: steps.plan.round_of(name) for name in run.data.sets}
    return {
        name: score
        for part in ([names] if together else [[name] for name in names])
        for name, score in score_sets(model, steps.store, part, ranks, window=WINDOW, groups=groups).items()
    }


def test_scores_are_the_same_on_one_and_two_ranks(pools: Pools, tree: dict[str, Any]) -> None:
    expected = pools[1].run(score_moe, tree, 1)[0]
    for ep_size in (1, 2):
        for scores in pools[2].run(score_moe, tree, ep_size):
            for name, score in scores.items():
                np.testing.assert_allclose(score.bits, expected[name].bits, rtol=1e-5)
                np.testing.assert_allclose(score.expert_0_share, expected[name].expert_0_share, atol=1e-9)
                np.testing.assert_allclose(score.probability_0, expected[name].probability_0, rtol=1e-5)


def test_sets_that_share_batches_score_as_each_alone(pools: Pools, tree: dict[str, Any]) -> None:
    together = pools[2].run(score_moe, tree, 2)[0]
    alone = pools[2].run(partial(score_moe, together=False), tree, 2)[0]
    assert list(together) == list(alone) and len(together) > 2
    for name, score in together.items():
        assert score.characters == alone[name].characters
        np.testing.assert_allclose(score.bits, alone[name].bits, rtol=1e-5)
        for shares in ("expert_0_share", "probability_0", "classified_old", "own_experts"):
            np.testing.assert_allclose(getattr(score, shares), getattr(alone[name], shares), rtol=1e-5)
    assert len({tuple(score.probability_0) for score in together.values()}) == len(together)


@pytest.mark.parametrize("classifier", ["token", "sequence"])
def test_sequences_that_are_classified_whole_are_scored_without_padding(tmp_path: Path, classifier: str) -> None:
    experts = {"allocation": "explicit", "counts": [3, 2, 1, 4], "classifier_layers": [0, 3], "classifier": classifier}
    run = prepared_run(tmp_path, experts=experts)
    context = RunContext(run)
    model = context.untrained.load(torch.float32, ParallelDims(1, 1, 0), classifiers=True).eval()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _model, _inputs, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    score_sets(model, context.store, run.data.sets, Ranks(0, 1, torch.device("cpu")), window=LONG)
    lengths = [window.end for name in run.data.sets for window in document_windows(context.store, name, LONG)]
    if classifier == "sequence":
        assert sorted(shapes) == sorted((1, length) for length in lengths)
    else:
        longest = LENGTH_MULTIPLE * math.ceil(max(lengths) / LENGTH_MULTIPLE)
        assert shapes == [(len(lengths), longest)], "one batch of all sets' windows"


def test_every_character_of_whole_documents_is_scored_once(tree: dict[str, Any]) -> None:
    steps = RunContext(parse_run(tree, "x"))
    store = steps.store
    model = load_dense(steps.dense, torch.float32)
    score = score_sets(model, store, ["el"], Ranks(0, 1, torch.device("cpu")), window=WINDOW)["el"]
    shard = store.held_out("el")
    assert len(score.bits) == shard.num_documents
    assert sum(score.characters) == sum(d.characters for d in store.held_out_documents("el"))
    for document in range(shard.num_documents):
        text = shard.document(document)[:-1]
        ids = torch.tensor([store.separator_id, *text.tolist()])
        bits = scored = 0.0
        for start in range(0, len(ids) - 1, WINDOW):
            end = min(start + WINDOW + 1, len(ids))
            part = ids[max(0, end - WINDOW - 1) : end]  # the last window is full too, if the document is that long
            with torch.no_grad():
                log_probabilities = model(input_ids=part[None, :-1]).logits[0].log_softmax(-1)
            new = end - 1 - start
            bits -= float(log_probabilities.gather(1, part[1:, None])[-new:].sum()) / math.log(2)
            scored += new
        assert scored == len(text)
        assert score.bits[document] == pytest.approx(bits, rel=1e-5)


def test_max_tokens_scores_whole_documents_from_the_head(tree: dict[str, Any]) -> None:
    store = RunContext(parse_run(tree, "x")).store
    first = len(store.held_out("en").document(0)) - 1
    windows = document_windows(store, "en", WINDOW, max_tokens=first)
    assert {w.document for w in windows} == {0}
    assert sum(w.scored for w in windows) == first


def test_paired_interval_covers_the_true_change_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        size = generator.lognormal(6, 1, 60)
        factor = generator.normal(0.8, 0.1, 60)
        change = paired_change(size, size * factor)
        assert change.interval is not None
        covered += abs(change.percent - -20.0) <= change.interval
    assert 0.88 <= covered / 400 <= 0.98
    assert paired_change(np.array([2.0]), np.array([1.0])) == Change(percent=-50.0, interval=None)


def hashed_before_scoring(ranks: Ranks, folder: Path) -> list[str]:
    hashed: list[str] = []

    def noting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    with patch.object(verify, "sha256_file", noting):
        check_weights(Scored("stage1", (folder,), {}), ranks)
    return hashed


def test_ranks_share_the_verification_of_a_checkpoint_and_damage_is_named(
    pools: Pools, tree: dict[str, Any], tmp_path: Path
) -> None:
    spread = with_parallel(tree, ranks=2, ep_size=2, micro_batch_size=2)
    pools[2].run(train_steps, spread, 1, tmp_path / "stage1", 1, 1)
    folder = tmp_path / "stage1" / "step000001"
    weights = sorted(path.name for path in folder.glob("*model_states.pt"))
    hashed = pools[2].run(hashed_before_scoring, folder)
    assert sorted(hashed[0] + hashed[1]) == weights and all(hashed)
    (folder / weights[-1]).write_bytes(b"")
    with pytest.raises(
        AssertionError, match=f"AgreedError: .*{weights[-1]} damaged or missing; name another checkpoint"
    ):
        pools[2].run(hashed_before_scoring, folder)

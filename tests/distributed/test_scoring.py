"""Bits per character are the model's, whatever the ranks. Run: pytest tests/distributed/test_scoring.py"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.distributed.process_group import Ranks
from pipeline.evaluation.evaluate import load_checkpoint, paired_change
from pipeline.evaluation.scoring import document_windows, score_set
from pipeline.model.backbone import load_dense, model_folder
from tests.distributed.conftest import Pools
from tests.distributed.stages import stage_inputs, with_parallel
from tests.helpers.tiny import prepared_run, run_tree

WINDOW = 16


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scoring")
    prepared_run(folder)
    return run_tree(folder)


def score_moe(ranks: Ranks, tree: dict[str, Any], ep_size: int) -> dict[str, Any]:
    inputs = stage_inputs(with_parallel(tree, ranks=ranks.world_size, ep_size=ep_size), 1, Path())
    model = load_checkpoint(inputs.run, inputs.plan, inputs.upcycled, [], torch.float32, ranks)
    return {name: score_set(model, inputs.store, name, ranks, window=WINDOW) for name in inputs.run.data.sets}


def test_scores_are_the_same_on_one_and_two_ranks(pools: Pools, tree: dict[str, Any]) -> None:
    expected = pools[1].run(score_moe, tree, 1)[0]
    for ep_size in (1, 2):
        for scores in pools[2].run(score_moe, tree, ep_size):
            for name, score in scores.items():
                np.testing.assert_allclose(score.bits, expected[name].bits, rtol=1e-5)
                np.testing.assert_allclose(score.expert_0_share, expected[name].expert_0_share, atol=1e-9)
                np.testing.assert_allclose(score.probability_0, expected[name].probability_0, rtol=1e-5)


def test_every_character_of_whole_documents_is_scored_once(tree: dict[str, Any]) -> None:
    inputs = stage_inputs(tree, 1, Path())
    store = inputs.store
    model = load_dense(model_folder(inputs.run.model), torch.float32)
    score = score_set(model, store, "el", Ranks(0, 1, torch.device("cpu")), window=WINDOW)
    shard = store.held_out("el")
    assert len(score.bits) == shard.num_documents
    assert score.characters.sum() == sum(d.characters for d in store.held_out_documents("el"))
    for document in range(shard.num_documents):
        text = shard.document(document)[:-1]
        ids = torch.tensor([store.separator_id, *text.tolist()])
        bits = scored = 0.0
        for start in range(0, len(ids) - 1, WINDOW):
            part = ids[start : start + WINDOW + 1]
            with torch.no_grad():
                log_probabilities = model(input_ids=part[None, :-1]).logits[0].log_softmax(-1)
            bits -= float(log_probabilities.gather(1, part[1:, None]).sum()) / math.log(2)
            scored += len(part) - 1
        assert scored == len(text)
        assert score.bits[document] == pytest.approx(bits, rel=1e-5)


def test_max_tokens_scores_whole_documents_from_the_head(tree: dict[str, Any]) -> None:
    store = stage_inputs(tree, 1, Path()).store
    first = len(store.held_out("en").document(0)) - 1
    windows = document_windows(store, "en", WINDOW, max_tokens=first)
    assert {w.document for w in windows} == {0}
    assert sum(len(w.ids) - 1 for w in windows) == first


def test_paired_interval_covers_the_true_change_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        size = generator.lognormal(6, 1, 60)
        factor = generator.normal(0.8, 0.1, 60)
        percent, interval = paired_change(size, size * factor)
        assert interval is not None
        covered += abs(percent - -20.0) <= interval
    assert 0.88 <= covered / 400 <= 0.98
    assert paired_change(np.array([2.0]), np.array([1.0])) == (-50.0, None)

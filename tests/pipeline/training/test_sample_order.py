"""The order of samples is a pure function of seed and content.

Run: pytest tests/pipeline/training/test_sample_order.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from pipeline.method.stages import find_stage
from pipeline.model.expert_plan import ExpertPlan
from pipeline.training.mixture import Source
from pipeline.training.sample_order import SampleOrder, document_positions, stage_order
from tests.helpers.preparation import prepare
from tests.helpers.tiny import parse_run, run_tree, save_model

LENGTH = 8

PLAN = ExpertPlan.first_expansion([2], old=["en"], new=["el", "hu"], top_k=2, classifier_layers=[])


class InMemory:
    """Tokens for tests."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def order(num_samples: int = 60, seed: int = 1) -> SampleOrder:
    sources = [
        Source("en", InMemory(np.arange(1000, 1000 + 8 * 10 + 1, dtype=np.uint16)), 1.0, True, 0),
        Source("el", InMemory(np.arange(0, 8 * 25 + 5, dtype=np.uint16)), 3.0, False, 1),
    ]
    return SampleOrder(sources, sequence_length=LENGTH, num_samples=num_samples, seed=seed)


def test_an_epoch_holds_every_window_once_and_the_next_one_in_another_order() -> None:
    samples = order(400)
    starts = [int(samples.window(1, number)[0]) for number in range(50)]
    assert sorted(starts[:25]) == sorted(starts[25:]) == [LENGTH * i for i in range(25)]
    assert starts[:25] != starts[25:]


def test_labels_are_the_next_tokens_and_no_sample_crosses_sets() -> None:
    batch = order().batch(0, 60)
    np.testing.assert_array_equal(batch.labels[:, :-1], batch.ids[:, 1:])
    for ids, labels, source, groups in zip(batch.ids, batch.labels, batch.sources, batch.groups, strict=True):
        tokens = np.append(ids, labels[-1])
        np.testing.assert_array_equal(np.diff(tokens), 1)
        assert (tokens >= 1000).all() == (source == 0)
        assert (groups == source).all()  # the old source is of group 0, the new one of group 1


@pytest.mark.parametrize(("ranks", "micro"), [(1, 6), (2, 3), (3, 1)])
def test_ranks_and_micro_batches_only_say_who_computes_a_sample(ranks: int, micro: int) -> None:
    whole = order().batch(12, 12).ids
    pieces = [
        order().batch(12 + (step * ranks + rank) * micro, micro).ids
        for step in range(12 // (ranks * micro))
        for rank in range(ranks)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_longer_run_begins_with_the_same_samples() -> None:
    np.testing.assert_array_equal(order(60).batch(0, 60).ids, order(500).batch(0, 60).ids)
    assert not np.array_equal(order(60, seed=2).batch(0, 60).ids, order(60).batch(0, 60).ids)


def test_old_tokens_are_known_without_reading() -> None:
    samples = order()
    for first in (0, 7, 31):
        assert samples.old_tokens(first, 9) == int((samples.batch(first, 9).groups == 0).sum())


def test_a_set_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"set el has 8 training tokens, less than one sample of 8 \+ 1"):
        SampleOrder([Source("el", InMemory(np.arange(8)), 1.0, False, 1)], sequence_length=8, num_samples=1, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_no_sample_is_lost_or_repeated_in_an_epoch_whatever_the_ranks_and_interruptions(world_size: int) -> None:
    tokens = InMemory(np.arange(LENGTH * 64 + 1))
    seen: list[int] = []
    done = 0
    for steps in (3, 1, 7, 2, 3):  # the job is interrupted after each of these, and resumed from the samples consumed
        samples = SampleOrder([Source("el", tokens, 1.0, False, 1)], sequence_length=LENGTH, num_samples=64, seed=5)
        for _ in range(steps):
            for rank in range(world_size):
                share = 4 // world_size
                seen += samples.batch(done + rank * share, share).ids[:, 0].tolist()
            done += 4
    assert sorted(seen) == list(range(0, LENGTH * 64, LENGTH))


def test_positions_begin_anew_after_each_separator() -> None:
    ids = np.array([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 6, 7, 8, 9, 1, 2]])
    assert document_positions(ids, 0).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"])
def test_an_isolated_document_of_a_packed_sample_has_the_logits_it_has_alone(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / family, family, 2), dtype=torch.float32).eval()
    parts = [[5, 9, 40, 0], [7, 0], [11, 12, 13, 14, 15]]
    packed = InMemory(np.array([id_ for part in parts for id_ in part] + [1]))
    samples = {
        isolate: SampleOrder(
            [Source("el", packed, 1.0, False, 1)], sequence_length=11, num_samples=1, seed=0, isolate=isolate
        )
        for isolate in (0, None)
    }
    with torch.no_grad():
        isolated, joined = (
            model(**samples[isolate].batch(0, 1).model_inputs("cpu"), use_cache=False).logits for isolate in (0, None)
        )
        start = 0
        for part in parts:
            alone = model(input_ids=torch.tensor([part]), use_cache=False).logits
            torch.testing.assert_close(isolated[:, start : start + len(part)], alone, rtol=1e-4, atol=1e-4)
            start += len(part)
    assert not torch.allclose(isolated[:, 6:], joined[:, 6:], rtol=1e-2, atol=1e-2)


def test_a_stage_isolates_documents_where_the_run_says_so(tmp_path: Path) -> None:
    tree = run_tree(tmp_path)
    tree["data"]["isolate_documents"] = True
    run = parse_run(tree, "x")
    store = prepare(run.data, run.model.path, 300, run.cache_dir, 17)
    order = stage_order(store, run.data, find_stage(run, 1), PLAN, 17)
    batch = order.batch(0, order.num_samples)
    assert batch.positions is not None
    np.testing.assert_array_equal(batch.positions, document_positions(batch.ids, store.separator_id))
    assert (batch.positions[:, 1:] == 0).any()

"""The mean of all pairs' cosines, without the pairs. Run: pytest tests/pipeline/method/test_similarity.py"""

import numpy as np
import pytest
import torch

from pipeline.method.similarity import document_windows, mean_unit_vectors, packed_windows, similarity_of
from pipeline.model.backbone import decoder_layers, load_dense
from tests.helpers.tiny import VOCAB_SIZE, save_model


def test_streamed_means_give_the_mean_over_all_pairs_of_tokens(tmp_path: pytest.TempPathFactory) -> None:
    model = load_dense(save_model(tmp_path / "model"), torch.float32)  # type: ignore[operator]
    generator = np.random.default_rng(0)
    texts = {name: generator.integers(0, VOCAB_SIZE, (4, 10)) for name in ("en", "el", "hu")}
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, ids in texts.items():
        seen: list[torch.Tensor] = []
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _m, x, s=seen: s.append(x[0]))
            for layer in decoder_layers(model)
        ]
        with torch.no_grad():
            model(input_ids=torch.from_numpy(ids), use_cache=False)
        for handle in handles:
            handle.remove()
        inputs[name] = [x.flatten(0, 1)[:37].double() for x in seen]
    means, tokens = {}, {}
    for name, ids in texts.items():
        vectors = mean_unit_vectors(model, [ids[:2], ids[2:]], 37, name)
        assert vectors.tokens == 37
        means[name], tokens[name] = vectors.means(), vectors.tokens
    measured = similarity_of(means, tokens, ["en"], ["el", "hu"])
    for layer in range(4):
        for a, b in (("en", "el"), ("en", "hu"), ("el", "hu"), ("el", "el")):
            unit_a, unit_b = (torch.nn.functional.normalize(inputs[n][layer], dim=-1) for n in (a, b))
            assert measured.pairs[f"{a}&{b}"][layer] == pytest.approx(float((unit_a @ unit_b.T).mean()), rel=1e-6)
        within = measured.pairs["el&hu"][layer]
        across = (measured.pairs["en&el"][layer] + measured.pairs["en&hu"][layer]) / 2
        assert measured.by_layer[layer] == pytest.approx((within + across) / 2)


def test_one_new_language_is_compared_with_itself() -> None:
    means = {"en": np.array([[1.0, 0.0]]), "el": np.array([[0.6, 0.6]])}
    measured = similarity_of(means, {"en": 1, "el": 1}, ["en"], ["el"])
    assert measured.by_layer[0] == pytest.approx((0.72 + 0.6) / 2)


def test_packed_windows_hold_every_token_once_and_documents_are_read_alone() -> None:
    documents = [np.arange(7), np.arange(100, 105), np.arange(200, 209)]
    packed = list(packed_windows(documents, 4, batch_size=2))
    assert [batch.shape for batch in packed] == [(2, 4), (2, 4), (1, 4), (1, 1)]
    np.testing.assert_array_equal(np.concatenate([batch.ravel() for batch in packed]), np.concatenate(documents))
    alone = [batch.tolist() for batch in document_windows(documents, 6)]
    assert alone == [
        [[0, 1, 2, 3, 4, 5]], [[6]], [[100, 101, 102, 103, 104]],
        [[200, 201, 202, 203, 204, 205]], [[206, 207, 208]],
    ]  # fmt: skip

"""Rows for new tokens beside Hugging Face's resized models, family by family.

Run: pytest tests/pipeline/model/test_new_rows.py
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from common.errors import UserError
from data_prep.extension import NewTokens
from pipeline.method.new_tokens import ExtendedTokenizer, add_new_rows, mean_rows
from pipeline.method.stages import find_stage
from pipeline.model.backbone import load_dense, train_only
from pipeline.model.expert_plan import ExpertPlan
from pipeline.model.new_rows import ExtendedEmbedding, ExtendedHead, install_new_rows, new_rows, vocabulary_of
from pipeline.records.checkpoint import NewRows
from pipeline.training.utilization import flops_of_stage
from tests.helpers.tiny import FAMILIES, HIDDEN, parse_run, run_tree, save_model

PIECES = ((5, 6), (7, 8, 9), (10, 10, 11))
FIRST = 300
TIED = ("qwen2", "gemma", "gemma2", "gemma3")


def extended(folder: Path, family: str, vocab_size: int) -> nn.Module:
    save_model(folder, family, vocab_size=vocab_size, tie_word_embeddings=family in TIED)
    model = load_dense(folder, torch.float32)
    assert add_new_rows(model, ExtendedTokenizer(folder, "x", NewTokens(FIRST, PIECES))) == (
        len(PIECES) * HIDDEN * (1 if family in TIED else 2)
    )
    return model


# As many rows as the tokenizer has ids, padding that new tokens fill in part, and padding that they need all of.
@pytest.mark.parametrize("vocab_size", [300, 310, 302], ids=["no padding", "padding to spare", "too little padding"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_gradients_are_those_of_a_resized_model(tmp_path: Path, family: str, vocab_size: int) -> None:
    model = extended(tmp_path, family, vocab_size)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    size = max(vocab_size, FIRST + len(PIECES))
    plain.resize_token_embeddings(size, mean_resizing=False)
    tables = [plain.get_input_embeddings().weight, plain.get_output_embeddings().weight]
    with torch.no_grad():
        for table in tables[: 1 if family in TIED else 2]:
            table[FIRST : FIRST + len(PIECES)] = mean_rows(table, PIECES)
    assert vocabulary_of(model) == size
    ids = torch.tensor([[0, 5, 300, 301, 7, 302, 302, size - 1], [302, 299, 4, 3, 2, 1, 300, 0]])
    train_only(model, experts=True, classifiers=False)
    found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found[..., 290:].square().sum().backward()
    expected[..., 290:].square().sum().backward()
    rows = new_rows(model)
    assert [parameter.requires_grad for parameter in model.parameters()].count(True) == len(rows)
    for parameter, table in zip(rows, tables, strict=family not in TIED):
        assert parameter.grad is not None and table.grad is not None
        theirs = table.grad[FIRST : FIRST + len(PIECES)]
        assert (parameter.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_tied_head_has_the_embeddings_new_rows_and_an_untied_one_its_own(tmp_path: Path) -> None:
    for family, count in (("qwen2", 1), ("llama", 2)):
        model = extended(tmp_path / family, family, 300)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(embedding, ExtendedEmbedding) and isinstance(head, ExtendedHead)
        assert (embedding.new_rows is head.new_rows) == (count == 1) == (embedding.weight is head.weight)
        assert len(new_rows(model)) == count


def test_rows_of_an_earlier_expansion_never_train(tmp_path: Path) -> None:
    save_model(tmp_path)
    for train in (True, False):
        model = load_dense(tmp_path, torch.float32)
        install_new_rows(model, NewRows(first=300, count=3, tokenizer="x", train=train))
        train_only(model, experts=True, classifiers=False)
        assert [rows.requires_grad for rows in new_rows(model)] == [train, train]
        train_only(model, experts=False, classifiers=True)
        assert not any(rows.requires_grad for rows in new_rows(model))


def test_an_embedding_or_a_head_that_does_more_is_refused_in_one_line(tmp_path: Path) -> None:
    class OtherEmbedding(nn.Embedding):
        """Of unknown use."""

    rows = NewRows(first=300, count=3, tokenizer="x")
    save_model(tmp_path)
    model = load_dense(tmp_path, torch.float32)
    model.set_input_embeddings(OtherEmbedding(300, HIDDEN))
    with pytest.raises(UserError, match=r"^model\.tokenizer: LlamaForCausalLM has an embedding .* OtherEmbedding, .*"):
        install_new_rows(model, rows)
    model = load_dense(tmp_path, torch.float32)
    model.set_output_embeddings(nn.Linear(HIDDEN, 300, bias=True))
    with pytest.raises(UserError, match=r"a head of the type Linear, or one with a bias"):
        install_new_rows(model, rows)


def test_operations_of_training_count_the_longer_head_and_the_way_down_to_the_embedding(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path), "x")
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=False,
    )  # fmt: skip
    plan = ExpertPlan.first_expansion([1, 1, 3], old=["en"], new=["el"], top_k=2, classifier_layers=[])
    rows = NewRows(first=300, count=5, tokenizer="x")
    layer = 2 * (4 * 8 * 8 + 3 * 8 * 16)  # two per weight of attention and MLP
    attention = 2 * 2 * run.stage1.sequence_length * 8  # of the backward
    router_layer = layer + 2 * 3 * 8 * 16 + 2 * 3 * 8  # two MLPs, and the router
    more = {number: flops_of_stage(config, plan, find_stage(run, number), rows) for number in (1, 2)}
    less = {number: flops_of_stage(config, plan, find_stage(run, number)) for number in (1, 2)}
    of_head = 2 * 5 * 8
    # In stage 1 the gradient goes down to the embedding, through all three layers; in stage 2 rows are frozen.
    assert more[1] - less[1] == 3 * of_head + 2 * layer + router_layer + 3 * attention
    assert more[2] - less[2] == 2 * of_head

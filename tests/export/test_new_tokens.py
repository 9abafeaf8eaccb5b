"""An exported mixture with rows for new tokens. Run: pytest tests/export/test_new_tokens.py"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from data_prep.extension import NewTokens
from pipeline.export.export import export
from pipeline.method.new_tokens import ExtendedTokenizer, add_new_rows
from pipeline.model.new_rows import new_rows
from tests.export.test_folder import FIRST as PLAN
from tests.export.test_folder import mixture

FIRST = 300
PIECES = ((5, 6), (7, 8, 9), (10, 10, 11))
TIED = {"llama": False, "gemma3": True}  # by family; gemma3 scales the rows that it looks up too


# As many rows as the tokenizer has ids, padding that new tokens fill in part, and padding that they need all of.
@pytest.mark.parametrize("vocab_size", [300, 310, 302], ids=["no padding", "padding to spare", "too little padding"])
@pytest.mark.parametrize("family", list(TIED))
def test_old_and_new_rows_are_one_weight_whose_logits_are_those_of_the_model_in_training(
    tmp_path: Path, family: str, vocab_size: int
) -> None:
    model = mixture(tmp_path / "dense", family, PLAN, vocab_size=vocab_size, tie_word_embeddings=TIED[family])
    add_new_rows(model, ExtendedTokenizer(tmp_path, "x", NewTokens(FIRST, PIECES)))
    for rows in new_rows(model):
        rows.data += 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    size = max(vocab_size, FIRST + len(PIECES))
    ids = torch.randint(size, (3, 24), generator=torch.Generator().manual_seed(1))
    ids[:, :3] = torch.arange(FIRST, FIRST + 3)
    old, new = model.get_input_embeddings().weight.detach().clone(), new_rows(model)[0].detach().clone()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    replaced = sum(min(len(PIECES), vocab_size - FIRST) * rows.shape[1] for rows in new_rows(model))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits

    said = export(model, PLAN, tmp_path / "dense", tmp_path / "exported", torch.float32, np.asarray(ids))
    assert said.difference < 1e-5 * max(1.0, said.largest)
    assert said.parameters == parameters - replaced
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == size
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as file:
        tables = {name for name in file.keys() if "embed_tokens" in name or "lm_head" in name}  # noqa: SIM118
        assert tables == {"model.embed_tokens.weight", *([] if TIED[family] else ["lm_head.weight"])}
        rows = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(rows, torch.cat([old[:FIRST], new, old[FIRST + len(PIECES) :]]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    loaded.set_experts_implementation("eager")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == TIED[family]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        output = loaded.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
    assert output.shape[1] > 8

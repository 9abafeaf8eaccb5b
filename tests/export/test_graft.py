"""What instruction tuning added to a dense model, added to a mixture. Run: pytest tests/export/test_graft.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from pipeline.export.graft import chat_template, graft
from pipeline.model.backbone import load_dense, named_moe_layers
from pipeline.model.moe.experts import fused_weights
from tests.export.test_folder import FIRST, SECOND, mixture
from tests.helpers.tiny import save_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_instruct(base: Path, folder: Path) -> Path:
    """The base model with other weights and a chat template."""
    model = load_dense(base, torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_dense(folder, torch.float32).named_parameters())


@pytest.mark.parametrize("plan", [FIRST, SECOND], ids=["one round", "two rounds"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_weight_with_a_counterpart_gets_the_difference_and_nothing_else_changes(
    family: str, plan: Any, tmp_path: Path
) -> None:
    model = mixture(tmp_path / "base", family, plan)
    instruct = save_instruct(tmp_path / "base", tmp_path / "instruct")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    count = graft(model, tmp_path / "base", instruct)
    dense, tuned = weights(tmp_path / "base"), weights(instruct)
    difference = {name: tuned[name] - one for name, one in dense.items()}
    own = sum(len(list(layer.local_experts.parameters())) for layer in named_moe_layers(model).values())
    assert count == len(dense) + own
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            expected = before[name]
        elif ".deepspeed_experts." in name:
            layer, _, rest = name.partition(".deepspeed_moe.")
            mlp = {n.removeprefix(f"{layer}."): one for n, one in difference.items() if n.startswith(f"{layer}.")}
            expected = before[name] + fused_weights(mlp)[rest.split(".")[-1]]
        else:
            expected = before[name] + difference[name.replace(".base_mlp.", ".")]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


def test_a_mixture_of_copies_becomes_the_instruct_model(tmp_path: Path) -> None:
    model = mixture(tmp_path / "base", "llama", FIRST)
    for layer in named_moe_layers(model).values():
        for expert in layer.local_experts.experts:
            expert.copy_mlp(layer.base_mlp.state_dict())
    instruct = save_instruct(tmp_path / "base", tmp_path / "instruct")
    graft(model, tmp_path / "base", instruct)
    ids = torch.arange(2, 40).view(2, 19)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        expected = load_dense(instruct, torch.float32)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_chat_template_is_the_instruct_model_s(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    assert chat_template(base) is None
    assert chat_template(save_instruct(base, tmp_path / "instruct")) == TEMPLATE


def test_models_that_do_not_belong_together_are_refused_in_one_line(tmp_path: Path) -> None:
    model = mixture(tmp_path / "base", "llama", FIRST)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    base = tmp_path / "base"
    wider = save_model(tmp_path / "wider", intermediate_size=64)
    deeper = save_model(tmp_path / "deeper", num_layers=5)
    other = save_instruct(base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(other)
    cases = {
        base: "has the weights of .*: there is nothing to add; name another model",
        wider: r"mlp.down_proj.weight is \(32, 64\), but \(32, 48\) in .*base; name an instruct model that was tuned",
        deeper: r"model.layers.4.input_layernorm.weight is \(32,\), but nothing in .*base",
        other: r"its tokenizer differs from that of .*base in 1 tokens, such as '<\|user\|>' \(",
    }
    for instruct, line in cases.items():
        with pytest.raises(UserError, match=line) as caught:
            graft(model, base, instruct)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with pytest.raises(UserError, match="the trained model has other layers than the dense one"):
        graft(load_dense(deeper, torch.float32), base, save_instruct(base, tmp_path / "instruct"))

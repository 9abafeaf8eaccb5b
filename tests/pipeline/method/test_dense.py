"""What baselines add to dense models of each family. Run: pytest tests/pipeline/method/test_dense.py"""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from common.errors import UserError
from pipeline.checkpoint.tensors import main_file, save_tensors
from pipeline.config.method import MethodConfig
from pipeline.method.dense import extend
from pipeline.method.llama_pro import new_blocks, sources
from pipeline.method.untrained import UntrainedDense, dense_parameter_counts
from pipeline.model.backbone import decoder_layers, load_dense
from pipeline.model.model_folder import model_config
from tests.helpers.tiny import FAMILIES, save_model

METHODS = {
    "full": MethodConfig(name="full"),
    "lora": MethodConfig(name="lora", rank=4),
    "llama_pro": MethodConfig(name="llama_pro", blocks=3),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.arange(2 * 40).view(2, 40) * 7 % 300


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The same model after what trains has changed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@each_family
@each_method
def test_an_extended_model_computes_what_the_dense_one_does(family: str, method: MethodConfig, tmp_path: Path) -> None:
    folder = save_model(tmp_path, family)
    dense = load_dense(folder, torch.float32)
    expected = logits_of(dense)
    extended = extend(dense, method, seed=5)
    assert torch.equal(logits_of(extended), expected)
    assert not torch.equal(logits_of(shaken(extended)), expected)


@each_family
@each_method
def test_decoding_with_a_cache_gives_what_the_whole_sequence_does(
    family: str, method: MethodConfig, tmp_path: Path
) -> None:
    model = shaken(extend(load_dense(save_model(tmp_path, family), torch.float32), method, seed=5))
    whole, cache, found = logits_of(model), None, []
    with torch.no_grad():
        for position in range(IDS.shape[1]):
            output = model(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@each_method
def test_weights_that_trained_are_read_back_by_the_function_that_evaluation_loads_with(
    method: MethodConfig, tied: bool, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    untrained = UntrainedDense(folder, "hash", method, seed=5)
    model = shaken(untrained.load(torch.float32))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "tag").mkdir()
    save_tensors({"module": trained}, tmp_path / "tag" / main_file())
    again = untrained.load(torch.float32, checkpoints=[tmp_path / "tag"])
    assert torch.equal(logits_of(again), logits_of(model))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    first = next(iter(trained))
    save_tensors({"module": {n: t for n, t in trained.items() if n != first}}, tmp_path / "tag" / main_file())
    with pytest.raises(UserError, match=f"{first} is missing"):
        untrained.load(torch.float32, checkpoints=[tmp_path / "tag"])


@pytest.mark.parametrize("tied", [True, False])
@each_method
def test_parameters_are_counted_without_memory_as_they_are(method: MethodConfig, tied: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path, tie_word_embeddings=tied)
    dense = load_dense(folder, torch.float32)
    before = sum(parameter.numel() for parameter in dense.parameters())
    parameters = list(extend(dense, method, seed=5).parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert dense_parameter_counts(model_config(folder), method) == {
        "dense": before, "total": total, "active": total, "stage1_trained": trained,
    }  # fmt: skip


def test_blocks_come_after_the_last_layer_of_each_group() -> None:
    assert sources(4, 2) == [0, 1, 1, 2, 3, 3]
    assert new_blocks(4, 2) == [2, 5]
    assert new_blocks(32, 8) == [4, 9, 14, 19, 24, 29, 34, 39]  # the paper's, of Llama-2-7B
    assert sources(3, 3) == [0, 0, 1, 1, 2, 2]
    uneven = sources(30, 8)
    assert len(uneven) == 38 and sorted(set(uneven)) == list(range(30)) and uneven[-2:] == [29, 29]
    with pytest.raises(UserError, match="method.blocks: 5 is more than the model's 4 layers"):
        sources(4, 5)


def test_a_new_block_is_a_copy_but_for_its_maps_back_and_shares_nothing(tmp_path: Path) -> None:
    dense = load_dense(save_model(tmp_path), torch.float32)
    model = extend(dense, METHODS["llama_pro"], seed=5)
    layers = decoder_layers(model)
    for number in new_blocks(4, 3):
        source = dict(layers[number - 1].named_parameters())
        for name, parameter in layers[number].named_parameters():
            if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                assert not parameter.any() and source[name].any()
            else:
                assert torch.equal(parameter, source[name]) and parameter.data_ptr() != source[name].data_ptr()
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(7))
    assert model.config.num_hidden_layers == 7 and dense.config.num_hidden_layers == 4


@pytest.mark.parametrize(("targets", "count"), [("all", 7), ("attention", 4), ("mlp", 3)])
def test_adapters_stand_where_the_run_says_and_follow_from_its_seed(targets: str, count: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    method = MethodConfig.model_validate({"name": "lora", "rank": 4, "targets": targets})
    models = [extend(load_dense(folder, torch.float32), method, seed) for seed in (5, 5, 6)]
    found = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert len(found[0]) == 4 * count * 2
    assert all(torch.equal(found[1][name], p) for name, p in found[0].items())
    assert all(torch.equal(found[2][name], p) == (".lora_B." in name) for name, p in found[0].items())
    assert all(not p.any() for name, p in found[0].items() if ".lora_B." in name)

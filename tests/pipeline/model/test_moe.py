"""The MoE layer, its classifier, and the losses' edges. Run: pytest tests/pipeline/model/test_moe.py"""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.method import losses
from pipeline.method.losses import classifier_loss, load_balancing_loss, lpr_loss, next_token_loss
from pipeline.model.backbone import install_moe_layers, moe_layers
from pipeline.model.expert_plan import ExpertPlan, LayerPlacement
from pipeline.model.moe import MoELayer, Routing, collect_routings
from pipeline.model.moe import rows as rows_module
from pipeline.model.moe.router import Router, classify
from pipeline.model.moe.rows import BLOCK_OF_ROWS, block_of_rows, sorted_choices

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    """A tiny Llama with distinct experts (3, 2, 1, 4) and classifiers that call some tokens old."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    plan = ExpertPlan.first_expansion([3, 2, 1, 4], old=["en"], new=["el"], top_k=2, classifier_layers=[0, 3])
    install_moe_layers(model, plan, classifiers=True)
    for name, parameter in model.named_parameters():
        if "deepspeed_moe" in name:
            parameter.data.normal_(0, 0.3)
    return model


def token_ids() -> torch.Tensor:
    """Two sequences, on the default device: tests/gpu runs these tests too."""
    return torch.arange(40).view(2, 20) * 7 % 97


def routing_of(layer: MoELayer, x: torch.Tensor) -> Routing:
    """What the layer decides for these tokens."""
    with collect_routings(layer) as routings:
        layer(x)
    return routings[0]


def test_routings_come_in_the_order_of_the_layers_and_nothing_stays_on_the_model(model: Any) -> None:
    before = {id(module): set(vars(module)) for module in model.modules()}
    with collect_routings(model) as routings, torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
    assert [routing.scores_TE.shape for routing in routings] == [(40, 3), (40, 2), (40, 4)]
    assert [routing.class_logits_TC is not None for routing in routings] == [True, False, True]
    assert {id(module): set(vars(module)) for module in model.modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
    assert len(routings) == 3, "a forward after the block was collected"


@pytest.mark.parametrize("backward_within", [False, True])
def test_activation_checkpointing_adds_no_routing_and_gives_the_same_gradients(
    model: Any, backward_within: bool
) -> None:
    def gradients() -> tuple[int, list[torch.Tensor]]:
        model.zero_grad()
        with collect_routings(model) as routings:
            model(input_ids=token_ids(), use_cache=False)
            if backward_within:
                load_balancing_loss(routings).backward()
        if not backward_within:
            load_balancing_loss(routings).backward()
        return len(routings), [layer.router.wg.weight.grad.clone() for layer in moe_layers(model)]

    _, expected = gradients()
    calls = []
    moe_layers(model)[1].router.register_forward_pre_hook(lambda *_: calls.append(None))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    number, found = gradients()
    assert number == 3
    assert len(calls) == 2, "the layer was not computed again in the backward"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert theirs.abs().max() > 0


def test_changing_a_later_token_never_changes_an_earlier_tokens_output(model: Any) -> None:
    with torch.no_grad():
        before = model(input_ids=token_ids(), use_cache=False).logits
        changed = token_ids().clone()
        changed[:, 15:] = (changed[:, 15:] + 11) % 97
        with collect_routings(model) as routings:
            after = model(input_ids=changed, use_cache=False).logits
    is_old = classify(routings[0].class_logits_TC) == 0
    assert 0 < is_old.sum() < len(is_old)  # the classifier does something
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:, 15:], before[:, 15:], atol=1e-3)


def test_decoding_token_by_token_with_a_cache_equals_the_full_sequence(model: Any) -> None:
    with torch.no_grad():
        full = model(input_ids=token_ids(), use_cache=False).logits
        cache, steps = None, []
        for position in range(token_ids().shape[1]):
            output = model(input_ids=token_ids()[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)


def test_a_token_classified_as_old_costs_one_mlp_and_is_the_original_mlps_output(model: Any) -> None:
    layer = moe_layers(model)[0]
    x = torch.randn(50, 32)
    counted = []
    for expert in layer.local_experts.experts:
        expert.register_forward_hook(lambda _m, inputs, _o: counted.append(len(inputs[0])))
    with torch.no_grad():
        with collect_routings(layer) as routings:
            y = layer(x)
        (routing,) = routings
        is_old = classify(routing.class_logits_TC) == 0
        assert 0 < is_old.sum() < 50
        torch.testing.assert_close(y[is_old], layer.base_mlp(x[is_old]), rtol=1e-5, atol=1e-6)
    new_tokens = int((~is_old).sum())
    on_0 = int((routing.ids_TK[~is_old] == 0).sum())
    assert sum(counted) == 2 * new_tokens - on_0
    assert torch.equal(routing.weights_TK[is_old], torch.tensor([[1.0, 0.0]]).expand(int(is_old.sum()), 2))


def test_a_fresh_classifier_changes_nothing(model: Any) -> None:
    layer = moe_layers(model)[0]
    x = torch.randn(9, 32)
    layer.router.classifier.weight.data.zero_()
    with torch.no_grad():
        with_classifier = layer(x)
        layer.router.classifier = None
        torch.testing.assert_close(layer(x), with_classifier, rtol=0, atol=0)


def test_a_micro_batch_without_old_tokens_gives_a_finite_loss_and_no_lpr_gradient(model: Any) -> None:
    with collect_routings(model) as routings:
        logits = model(input_ids=token_ids(), use_cache=False).logits
    none_old = torch.ones(token_ids().numel(), dtype=torch.int64)
    for form in ("paper", "reference"):
        loss = lpr_loss(routings, none_old, form=form)  # type: ignore[arg-type]
        assert loss.item() == 0.0
        gradients = torch.autograd.grad(
            loss, [layer.router.wg.weight for layer in moe_layers(model)], retain_graph=True
        )
        assert all(float(g.abs().max()) == 0.0 for g in gradients)
    total = next_token_loss(logits, token_ids()) + lpr_loss(routings, none_old) + classifier_loss(routings, none_old)
    assert torch.isfinite(total)


def test_lpr_pulls_old_tokens_towards_expert_0_and_leaves_others_alone(model: Any) -> None:
    with collect_routings(model) as routings:
        model(input_ids=token_ids(), use_cache=False)
    routing = routings[2]
    groups = torch.ones(token_ids().numel(), dtype=torch.int64)
    groups[:5] = 0
    (gradient,) = torch.autograd.grad(lpr_loss([routing], groups), routing.logits_TE)
    assert (gradient[:5, 0] < 0).all()
    assert (gradient[:5, 1:] > 0).all()
    assert (gradient[5:] == 0).all()


@pytest.fixture
def third_round() -> MoELayer:
    """A layer of 6 distinct experts, the first 1, 3 and 3 of them from before rounds 1, 2 and 3, with a classifier."""
    torch.manual_seed(4)
    mlp = LlamaForCausalLM(LlamaConfig(**SIZES)).model.layers[0].mlp
    placement = LayerPlacement(ParallelDims(1, 1), [[1, 2, 3, 4, 5]])
    layer = MoELayer(mlp, num_experts=6, top_k=2, placement=placement, has_classifier=True, old_experts=(1, 3, 3))
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3)
    return layer


def test_a_token_of_an_old_group_takes_its_experts_from_those_of_its_time(third_round: MoELayer) -> None:
    x = torch.randn(200, 32)
    with torch.no_grad():
        routing = routing_of(third_round, x)
        output = third_round(x)
        experts = [third_round.base_mlp, *third_round.local_experts.experts]
        classes = (x @ third_round.router.classifier.weight.T).argmax(-1)
        assert sorted(set(classes.tolist())) == [0, 1, 2, 3]
        for token in range(200):
            allowed = (1, 3, 3, 6)[classes[token]]
            scores = routing.logits_TE[token, :allowed].softmax(-1)
            weights, chosen = scores.topk(min(2, allowed))
            expected = sum(
                weight / weights.sum() * experts[expert](x[token : token + 1])[0]
                for weight, expert in zip(weights, chosen.tolist(), strict=True)
            )
            torch.testing.assert_close(output[token], expected, rtol=1e-5, atol=1e-5)
    assert (routing.active_TK.sum(-1) == torch.where(classes == 0, 1, 2)).all()


def test_the_last_of_equal_classes_counts_so_that_new_rows_may_be_copies() -> None:
    assert classify(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 2.0], [3.0, 2.0, 2.0]])).tolist() == [
        1, 2, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("only_base", [False, True])
def test_losses_of_mixed_groups_are_those_of_a_plain_loop(third_round: MoELayer, only_base: bool) -> None:
    x, counted = torch.randn(60, 32), torch.arange(60) % 7 != 3
    groups = torch.arange(60) % 4
    routing = routing_of(third_round, x)
    lpr, classifier = 0.0, 0.0
    for token in torch.nonzero(counted).flatten().tolist():
        group = int(groups[token])
        probabilities = routing.logits_TE[token].softmax(-1)
        if group < (1 if only_base else 3):
            lpr -= probabilities[: (1, 3, 3)[group]].sum().log()
        classifier -= routing.class_logits_TC[token].softmax(-1)[group].log()
    torch.testing.assert_close(lpr_loss([routing], groups, counted, only_base=only_base), lpr)
    torch.testing.assert_close(classifier_loss([routing], groups, counted), classifier)


def test_balance_loss_is_1_when_uniform_and_padding_does_not_count(model: Any) -> None:
    layer = moe_layers(model)[2]
    layer.router.classifier = None  # stage 1 has none
    layer.router.wg.weight.data.zero_()
    routing = routing_of(layer, torch.randn(64, 32))
    # all scores are equal: P is uniform, so N * sum f_i / N = 1 whatever the choices
    assert load_balancing_loss([routing]).item() == pytest.approx(1.0)
    mask = torch.arange(64) < 32
    layer.router.wg.weight.data.normal_()
    x = torch.randn(64, 32)
    masked = load_balancing_loss([routing_of(layer, x)], mask_T=mask)
    assert masked.item() == pytest.approx(load_balancing_loss([routing_of(layer, x[:32])]).item(), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_chunked_cross_entropy_equals_torchs(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 50, 300, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(300, (3, 50))
    mask = torch.rand(3, 50) < 0.6 if masked else None
    seven_rows = 4 * 300 * 7  # at a time, with a shorter last piece
    monkeypatch.setattr(losses, "BYTES_AT_ONCE", {"cpu": seven_rows, "cuda": seven_rows})
    no_gradient = logits.detach().clone()
    without = next_token_loss(no_gradient, labels, mask)
    assert torch.equal(no_gradient, logits)
    of_the_model = logits * 1.0
    ours = next_token_loss(of_the_model, labels, mask)
    assert torch.equal(ours, without)
    (gradient,) = torch.autograd.grad(ours * 0.3, of_the_model)
    assert gradient.data_ptr() == of_the_model.data_ptr()  # no second copy of the logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 50)
    expected = (each if mask is None else each * mask).sum()
    (expected_gradient,) = torch.autograd.grad(expected * 0.3, logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_layer_is_the_plain_formula(model: Any) -> None:
    layer = moe_layers(model)[2]
    layer.router.classifier = None
    x = torch.randn(30, 32)
    with torch.no_grad():
        scores = (x @ layer.router.wg.weight.T).softmax(-1)
        experts = [layer.base_mlp, *layer.local_experts.experts]
        expected = torch.zeros_like(x)
        for token in range(30):
            chosen = scores[token].topk(2).indices.tolist()
            for expert in chosen:
                weight = scores[token, expert] / scores[token, chosen].sum()
                expected[token] += weight * experts[expert](x[token : token + 1])[0]
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_selection_bias_chooses_but_weights_are_those_of_the_scores(top_k: int) -> None:
    torch.manual_seed(3)
    router = Router(32, 4, top_k, has_classifier=False, has_selection_bias=True)
    router.selection_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    x = torch.randn(50, 32)
    routing = router(x)
    scores = (x @ router.wg.weight.T).softmax(-1)
    torch.testing.assert_close(routing.scores_TE, scores)
    differs = 0
    for token in range(50):
        biased = [score + bias for score, bias in zip(scores[token].tolist(), [0.0, 0.3, -0.2, 0.1], strict=True)]
        chosen = sorted(range(4), key=lambda expert: -biased[expert])[:top_k]
        assert routing.ids_TK[token].tolist() == chosen
        torch.testing.assert_close(routing.weights_TK[token], scores[token, chosen] / scores[token, chosen].sum())
        differs += set(chosen) != set(scores[token].topk(top_k).indices.tolist())
    assert differs > 0


def test_moving_the_selection_bias_evens_the_loads_of_a_router_that_does_not_train() -> None:
    torch.manual_seed(5)
    router = Router(32, 6, 2, has_classifier=False, has_selection_bias=True)
    x = torch.randn(3000, 32) + torch.randn(32)  # with a direction that all tokens share, some experts are far ahead

    def imbalance() -> float:
        loads = router(x).ids_TK.flatten().bincount(minlength=6).float()
        router.balance(loads, 0.005)
        return float(loads.max() / loads.mean())

    imbalances = [imbalance() for _ in range(300)]
    assert imbalances[0] > 2.0
    assert max(imbalances[-20:]) < 1.15


def test_a_selection_bias_of_zeros_changes_no_bit_of_a_layer_and_its_gradients() -> None:
    results = []
    for has_bias in (False, True):
        torch.manual_seed(4)
        router = Router(32, 4, 2, has_classifier=False, has_selection_bias=has_bias)
        x = torch.randn(50, 32, requires_grad=True)
        routing = router(x)
        (routing.weights_TK * torch.arange(2.0)).sum().backward()
        results.append((routing.ids_TK, routing.weights_TK, x.grad, router.wg.weight.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_outputs_of_experts_are_kept_once_and_in_their_dtype(model: Any) -> None:
    layer = moe_layers(model)[2].bfloat16()
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    num_rows = int(sorted_choices(routing_of(layer, x), None, block_of_rows(x))[2].sum())
    outputs = [tensor for tensor in kept if tensor.shape == (num_rows, 32)]
    assert [tensor.dtype for tensor in outputs] == [torch.bfloat16]


def test_in_bf16_on_a_cpu_each_experts_rows_fill_whole_blocks_and_results_stay_the_same(model: Any) -> None:
    layer = moe_layers(model)[2].bfloat16()
    x = torch.randn(70, 32, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(70, 32, dtype=torch.bfloat16)
    num_active = int(routing_of(layer, x).active_TK.sum())
    sizes: list[int] = []
    for expert in (layer.base_mlp, *layer.local_experts.experts):
        expert.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    def run() -> list[torch.Tensor]:
        y = layer(x)
        trained = [layer.router.wg.weight, *layer.local_experts.parameters()]
        return [y, *torch.autograd.grad(y, [x, *trained], upstream)]

    filled, num_filled = run(), sizes.copy()
    sizes.clear()
    with patch.object(rows_module, "BLOCK_OF_ROWS", 1):
        plain = run()
    assert sum(sizes) == num_active
    assert num_filled == [BLOCK_OF_ROWS * math.ceil(size / BLOCK_OF_ROWS) for size in sizes] != sizes
    for ours, theirs in zip(filled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

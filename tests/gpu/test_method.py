"""The layer, the losses and the golden numbers on a GPU: the same tests as on a CPU.

Run: pytest tests/gpu/test_method.py
"""

from collections.abc import Iterator

import pytest
import torch

from tests.pipeline.method.test_golden import (  # noqa: F401
    test_a_token_of_an_old_group_takes_the_experts_of_its_time,
    test_balance_loss_in_reference_scale_and_its_gradient,
    test_equal_experts_give_the_dense_mlps_output,
    test_layer_and_all_gradients_equal_the_reference,
    test_lpr_loss_and_its_gradient,
    test_stage_1_step_of_a_two_layer_model_equals_the_reference,
    test_top_1_chooses_as_the_reference_and_renormalises_its_weight_to_1,
)
from tests.pipeline.model.test_linear import (  # noqa: F401
    test_a_weight_gradient_in_bf16_is_summed_in_fp32_and_rounded_once,
    test_outputs_and_gradients_are_torchs,
)
from tests.pipeline.model.test_moe import (  # noqa: F401
    model,
    test_a_fresh_classifier_changes_nothing,
    test_a_micro_batch_without_old_tokens_gives_a_finite_loss_and_no_lpr_gradient,
    test_a_selection_bias_chooses_but_weights_are_those_of_the_scores,
    test_a_token_classified_as_old_costs_one_mlp_and_is_the_original_mlps_output,
    test_a_token_of_an_old_group_takes_its_experts_from_those_of_its_time,
    test_activation_checkpointing_adds_no_routing_and_gives_the_same_gradients,
    test_changing_a_later_token_never_changes_an_earlier_tokens_output,
    test_chunked_cross_entropy_equals_torchs,
    test_decoding_token_by_token_with_a_cache_equals_the_full_sequence,
    test_layer_is_the_plain_formula,
    test_losses_of_mixed_groups_are_those_of_a_plain_loop,
    test_lpr_pulls_old_tokens_towards_expert_0_and_leaves_others_alone,
    test_outputs_of_experts_are_kept_once_and_in_their_dtype,
    third_round,
)
from tests.pipeline.model.test_rows import (  # noqa: F401
    test_in_bf16_weighted_sums_are_rounded_once,
    test_rows_taken_and_summed_have_the_gradients_of_a_plain_sum,
)

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)


@pytest.fixture(autouse=True)
def tensors_lie_on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def test_these_tests_compute_on_the_gpu() -> None:
    assert torch.randn(3).device.type == "cuda"
    assert torch.as_tensor([1.0]).device.type == "cuda"

"""The run that another one expands further (LayerMoE, arXiv 2505.22582, section 4): its checkpoint, as a model."""

from typing import TYPE_CHECKING, Any

from pipeline.run.context import RunContext

if TYPE_CHECKING:
    import torch

    from pipeline.distributed.process_group import Ranks


def load_start(context: RunContext, dtype: "torch.dtype", ranks: "Ranks") -> Any:
    """The model that a run starts from, whole on this process's device: the dense one, or its base run's.

    Raises:
        UserError: the base run's checkpoint is damaged.
    """
    from pipeline.evaluation.checkpoints import check_weights, load_model
    from pipeline.model.backbone import ONE_RANK, load_dense

    start = context.base_checkpoint
    if start is None:
        return load_dense(context.dense, dtype, ranks.device)
    assert start.upcycled is not None and start.plan is not None
    check_weights(start, ranks)
    return load_model(start, start.upcycled, start.plan, dtype, ONE_RANK, ranks.device)

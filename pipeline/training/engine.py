"""The DeepSpeed engine of a stage: its model, what trains of it, and the optimizer with its schedule."""

import io
import math
import warnings
from contextlib import redirect_stdout
from typing import Any

import deepspeed
from torch.optim.lr_scheduler import LambdaLR

from pipeline.checkpoint.engine import AtomicCheckpointEngine
from pipeline.config.run import StageConfig
from pipeline.model.backbone import moe_layers, parameter_groups
from pipeline.model.moe.recompute import keep_exchanges
from pipeline.training.ds_config import BatchShape, fill_ds_config, read_ds_config, training_dtype
from pipeline.training.inputs import StageInputs


def build_engine(inputs: StageInputs, shape: BatchShape) -> Any:
    """The engine, before any step.

    Args:
        inputs: what the stage starts from.
        shape: of the micro-batches.

    Returns:
        A ``deepspeed.DeepSpeedEngine`` that writes and reads checkpoints in our way.
    """
    ds_config = read_ds_config(inputs.run.ds_config_file)
    model = _load_model(inputs, ds_config)
    settings = inputs.stage.settings
    with redirect_stdout(io.StringIO()):  # it prints memory figures, not through its logger
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings)),
            config=fill_ds_config(ds_config, inputs.run, inputs.stage, inputs.dims, shape),
            dist_init_required=False,
        )
    inputs.stage.begin(engine.module)  # only now do all ranks have all weights: DeepSpeed has broadcast them
    # DeepSpeed writes this list into checkpoints, and by it means experts that have a file: all but expert 0.
    engine.num_experts = [layer.num_experts - 1 for layer in moe_layers(engine.module)]
    engine.checkpoint_engine = AtomicCheckpointEngine(engine._config, engine.module, inputs.dims)
    return engine


def _load_model(inputs: StageInputs, ds_config: dict[str, Any]) -> Any:
    """The untrained model, with the experts of the stage before if there is one; only what trains is not frozen."""
    stage = inputs.stage
    dtype = training_dtype(ds_config)
    checkpoints = [inputs.stage1_checkpoint] if inputs.stage1_checkpoint else []
    model = inputs.untrained.load(
        dtype, inputs.dims,
        checkpoints=checkpoints, classifiers=stage.has_classifiers, selection_biases=stage.balances_by_bias,
        reading="once",
    )  # fmt: skip
    stage.train_only(model)
    model.train()
    if stage.settings.activation_checkpointing:
        # Its new name is not in every transformers that works.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning, "transformers")
        options = {"use_reentrant": False, "context_fn": keep_exchanges}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def learning_rate_factor(step: int, settings: StageConfig) -> float:
    """Linear warm-up to 1 over ``warmup_ratio`` of the steps, then a cosine down to ``min_lr_ratio``.

    Args:
        step: number of optimizer steps taken before.
        settings: of the stage.

    Returns:
        The learning rate as a multiple of ``lr``.
    """
    warmup = math.ceil(settings.warmup_ratio * settings.num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress_made = (step - warmup) / max(1, settings.num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress_made)))
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine

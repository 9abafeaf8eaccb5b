"""What can be known of a run before it computes anything: settings that do not fit, and text that is too little."""

from collections.abc import Sequence

from common.errors import UserError
from pipeline.model.expert_plan import ExpertPlan
from pipeline.run.context import RunContext

MOST_EPOCHS = 4.0  # of a text; what is read more often teaches ever less (arXiv 2305.16264)
WITHOUT_BF16 = ("DEFAULT", "AVX2")  # what torch calls a CPU that has no such instructions
TOLERANCE = 0.05  # of a pass over replayed text


def check_model(context: RunContext) -> None:
    """Settings that have to fit the model.

    Raises:
        UserError: a sample or window is longer than the model's positions, a layer is not one of the model's, or
            similarities that are given are of another number of layers.
    """
    from pipeline.method.allocation import allocate
    from pipeline.method.dense import check_dense
    from pipeline.method.given_similarity import given_similarity
    from pipeline.model.expert_plan import check_layers
    from pipeline.model.model_folder import model_config

    run, config = context.run, model_config(context.dense).get_text_config()
    lengths = {
        "similarity.sequence_length": run.similarity.sequence_length,
        **{f"stage{number}.sequence_length": run.stage(number).sequence_length for number in run.stage_numbers},
        "evaluate.window": run.evaluate.window,
    }
    positions = getattr(config, "max_position_embeddings", None)
    for key, length in lengths.items():
        if positions is not None and length > positions:
            raise UserError(f"{key}: {length} is more than the model's {positions} positions; give at most that")
    if run.method.is_dense:
        check_dense(run.method, config.num_hidden_layers)
        return
    layers, wanted = config.num_hidden_layers, run.experts.classifier_layers
    if run.experts.similarity is not None:
        given_similarity(run.experts.similarity, layers)
    if run.experts.counts is not None:
        allocate(run.experts, layers, None)
    if isinstance(wanted, int) and wanted > layers:
        raise UserError(f"experts.classifier_layers: {wanted}, but the model has {layers} layers; give at most that")
    check_layers(wanted if isinstance(wanted, list) else [], layers)


def check_parallel(context: RunContext, world_size: int, device: str) -> None:
    """What can be known of a run on so many ranks before any of them starts.

    Args:
        context: the run.
        world_size: ranks.
        device: cpu or cuda.

    Raises:
        UserError: ep_size, batch, DeepSpeed config or monitors do not fit.
    """
    from pipeline.distributed.parallel_dims import ParallelDims
    from pipeline.method.stages import stages_of
    from pipeline.training.ds_config import batch_shape, check_zero, read_ds_config
    from pipeline.training.monitors import check_monitors

    run = context.run
    ds_config = read_ds_config(run.ds_config_file)
    check_monitors(run.log)
    if run.parallel.ep_size != "auto":
        ParallelDims(world_size, run.parallel.ep_size)
        check_zero(ds_config, run.parallel.ep_size)
    for stage in stages_of(run):
        batch_shape(run, stage.settings, world_size, device)


def has_slow_bf16() -> bool:
    """Whether it computes on a CPU without instructions for bf16, which converts to fp32 and back for each product."""
    import torch

    from pipeline.distributed.device import device_type

    return device_type() == "cpu" and torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16


def warn_of_slow_bf16(context: RunContext) -> None:
    """One line where a run asks for bf16 and :func:`has_slow_bf16`."""
    import torch

    if context.dtype == torch.bfloat16 and has_slow_bf16():
        print(
            f"warning: {context.run.deepspeed} asks for bf16, which this CPU computes several times slower than fp32: "
            "--set deepspeed=ds_configs/fp32_zero1.json",
            flush=True,
        )


def sample_warnings(context: RunContext, numbers: Sequence[int]) -> list[str]:
    """Lines on text that is read too often, or not often enough.

    Args:
        context: the run.
        numbers: of the stages that they are about.

    Raises:
        UserError: a set has less than one sample of one of them.
    """
    from pipeline.training.sample_order import stage_order

    lines = []
    for number in numbers:
        stage = context.stage(number)
        order = stage_order(context.store, context.run.data, stage, context.plan, context.run.seed)
        epochs = order.epochs()
        lines += _groups_without_text(context.plan, number, {source.group for source in order.sources})
        lines += [
            f"stage {number} reads {name} {value:.1f} times; after {MOST_EPOCHS:g} passes a text teaches ever less: "
            f"give it more text, or lower stage{number}.tokens"
            for name, value in epochs.items()
            if value > MOST_EPOCHS
        ]
        lines += _replay_warnings(context, number, epochs)
    return lines


def _groups_without_text(plan: ExpertPlan, number: int, groups: set[int]) -> list[str]:
    """Old groups of which a stage that replays others has no text."""
    last = plan.num_groups - 1
    if not groups - {last}:
        return []
    return [
        f"stage {number} replays no text of {', '.join(plan.rounds[group].languages)}, so nothing protects them: "
        "add some to data.old"
        for group in range(last)
        if group not in groups
    ]


def _replay_warnings(context: RunContext, number: int, epochs: dict[str, float]) -> list[str]:
    """Replayed text is meant to be read once."""
    if context.run.data.replay is None:
        return []
    old = {name: value for name, value in epochs.items() if name.partition("/")[0] in context.run.data.old}
    often = [f"{name} {value:.2f} times" for name, value in old.items() if 1 + TOLERANCE < value <= MOST_EPOCHS]
    seldom = [f"{value:.0%} of {name}" for name, value in old.items() if value < 1 - TOLERANCE]
    fix = f"change data.replay or stage{number}.tokens"
    return [
        *([f"stage {number} reads more than data.replay says: {', '.join(often)}; {fix}"] if often else []),
        *([f"stage {number} reads less than data.replay has chosen: {', '.join(seldom)}; {fix}"] if seldom else []),
    ]

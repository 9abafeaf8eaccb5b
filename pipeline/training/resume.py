"""Saving a stage, and resuming it from its newest sound checkpoint on any number of ranks."""

import io
import time
from contextlib import redirect_stdout

from common.errors import AgreedError
from pipeline.checkpoint.optimizer_state import SavedOptimizer
from pipeline.checkpoint.store import check_same_run, complete_tags, mark_best, read_manifest, save_checkpoint
from pipeline.checkpoint.tensors import main_file, optimizer_file, router_optimizer_file
from pipeline.checkpoint.verify import newest_sound_tag
from pipeline.checkpoint.weights import expert_files
from pipeline.distributed.parallel_dims import ParallelDims
from pipeline.model.backbone import moe_layers
from pipeline.records.checkpoint import CheckpointManifest
from pipeline.training.state import TrainingState


def resume(state: TrainingState) -> None:
    """Load the newest sound checkpoint, if there is one, whatever number of ranks saved it.

    Raises:
        AgreedError: it is of another model, plan or tokenizer, or of other settings.
    """
    inputs = state.inputs
    tag, complaints = newest_sound_tag(inputs.folder, state.ranks, _files_to_load(state))
    for complaint in complaints:
        state.ranks.say(complaint)
    if tag is None:
        return
    folder = inputs.folder / tag
    manifest = read_manifest(folder, CheckpointManifest)
    check_same_run(manifest.identity, inputs.identity, folder)
    if manifest.identity.settings != inputs.identity.settings:
        raise AgreedError(
            f"{folder}: was saved with other settings of this stage; add --force to train the stage from its start, "
            "or give the run another name"
        )
    saved_by = ParallelDims.that_saved(manifest)
    _load(state, tag, saved_by)
    state.step, state.saved_tag = manifest.step, tag
    if manifest.best_tag:
        assert manifest.best_value is not None
        state.best_value, state.best_tag = manifest.best_value, manifest.best_tag
        if state.ranks.is_first and state.best_tag in complete_tags(inputs.folder):
            mark_best(inputs.folder, state.best_tag, state.best_value)
    state.skipped_steps.load(manifest.skipped_steps)
    others = f" (saved by {saved_by.world_size} ranks, ep_size {saved_by.ep_size})" if saved_by != state.dims else ""
    state.say(f"resumed from {folder}{others} after {state.step} steps")


def _files_to_load(state: TrainingState) -> list[str]:
    """The files that DeepSpeed loads on this rank of a checkpoint that as many ranks have saved."""
    dims, engine = state.dims, state.engine
    if state.stage.uses_zero:
        own = optimizer_file(dims.rank, bf16=engine.bfloat16_enabled())
    else:
        own = router_optimizer_file()
    return [main_file(), own, *expert_files(state.inputs.plan, dims)]


def _load(state: TrainingState, tag: str, saved_by: ParallelDims) -> None:
    """Load weights, optimizer and schedule into the engine; the optimizer of other ranks is converted."""
    files = state.engine.checkpoint_engine
    if saved_by != state.dims:
        files.saved_by_others = SavedOptimizer(state.inputs.folder / tag, state.inputs.plan, saved_by)
    with redirect_stdout(io.StringIO()):
        state.engine.load_checkpoint(str(state.inputs.folder), tag=tag, load_module_strict=False)
    files.saved_by_others = None


def save(state: TrainingState) -> dict[str, float] | None:
    """Save a checkpoint, unless the one of this step was read or written already.

    Returns:
        How long it took (``seconds``) and how large it is (``gigabytes``); None if nothing was saved.

    Raises:
        AgreedError: it can't be written.
    """
    if state.saved_tag.partition("-")[0] == state.tag:  # the tag of a resized one ends in its ranks
        return None
    keep = state.inputs.run.checkpoint.keep
    figures = save_checkpoint(state.engine, state.inputs.folder, state.tag, manifest_of(state), keep)
    state.saved_tag = state.tag
    return figures


def manifest_of(state: TrainingState) -> CheckpointManifest:
    """The manifest of a checkpoint that is saved now; its files are still to be added."""
    return CheckpointManifest(
        identity=state.inputs.identity,
        stage=state.stage.number,
        step=state.step,
        samples=state.progress["samples"],
        best_value=state.best_value if state.best_tag else None,
        best_tag=state.best_tag,
        skipped_steps=state.skipped_steps.state(),
        ranks=state.dims.world_size,
        ep_size=state.dims.ep_size,
        max_imbalance=state.dims.max_imbalance,
        expert_plan=state.inputs.plan.model_dump(mode="json"),
        method=state.inputs.run.method.name,
        selection_biases=any(layer.router.selection_bias is not None for layer in moe_layers(state.engine.module)),
    )


class Saves:
    """When checkpoints are saved, and what they cost.

    Attributes:
        count: how many this session has saved.
        seconds: how long they took.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._settings = state.inputs.run.checkpoint
        self._last = time.monotonic()
        self.seconds = 0.0
        self.count = 0

    def due(self) -> bool:
        """Whether the settings ask for a checkpoint now; clocks differ from rank to rank, so ranks must agree."""
        by_step = self._settings.every_steps is not None and self._state.step % self._settings.every_steps == 0
        minutes = (time.monotonic() - self._last) / 60
        return by_step or (self._settings.every_minutes is not None and minutes >= self._settings.every_minutes)

    def save(self, *, must_be_written: bool = False) -> bool:
        """Save unless this step's checkpoint exists already.

        Args:
            must_be_written: raise if it can't be written, whatever ``checkpoint.if_full`` says.

        Returns:
            False if it could not be written and training continues without it.

        Raises:
            AgreedError: it can't be written.
        """
        state = self._state
        state.at(f"saving after step {state.step}")
        self._last = time.monotonic()
        try:
            figures = save(state)
        except AgreedError as error:
            if must_be_written or self._settings.if_full == "stop":
                raise
            state.say(f"warning: {error}; training continues (checkpoint.if_full)")
            return False
        if figures is not None:
            self.count += 1
            self.seconds += figures["seconds"]
            state.say(f"saved {state.tag}, {figures['gigabytes']:.2f} GB in {figures['seconds']:.1f} s")
        return True

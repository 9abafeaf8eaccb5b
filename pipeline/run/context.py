"""What the steps of a run share: its settings, its folder, and what earlier steps have left, read once."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import content_key
from common.remembered_hashes import RememberedHashes
from data_prep.executor.launch import Backend, shares_an_srun
from data_prep.make_plan import Planned
from data_prep.prepare import plan_preparation
from data_prep.store import TokenStore
from pipeline.config.load import load_run
from pipeline.config.run import RunConfig
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.checkpoint import CheckpointIdentity
from pipeline.records.evaluation import BASE
from pipeline.records.run_folder import PLAN_FILE, RUN_FILE, RunFolder
from pipeline.run.imported import ImportedBase

if TYPE_CHECKING:
    import torch

    from pipeline.distributed.parallel_dims import ParallelDims
    from pipeline.evaluation.checkpoints import Scored
    from pipeline.method.stage import Stage
    from pipeline.method.untrained import Untrained

MODEL_FILES = ("config.json", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class RunContext:
    """One run as its steps see it.

    Attributes:
        run: its settings.
        force: whether a step whose inputs changed is done again.
        redo: with ``force``, whether a step whose inputs did not change is done again too.
        quiet: whether a step that is done already says nothing.
    """

    run: RunConfig
    force: bool = False
    redo: bool = False
    quiet: bool = False

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.run.folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings as nested dictionaries, by the keys of its YAML."""
        return self.run.model_dump(mode="json", by_alias=True)

    @cached_property
    def dense(self) -> Path:
        """The dense model's folder."""
        from pipeline.model.model_folder import model_folder

        return model_folder(self.run.model)

    @cached_property
    def model_hash(self) -> str:
        """A content key of the dense model's config and weights."""
        files = sorted(path for pattern in MODEL_FILES for path in self.dense.glob(pattern))
        hashes = RememberedHashes(self.run.cache_dir / "hashes.json").sha256(files)
        return content_key({file.name: sha256 for file, sha256 in zip(files, hashes, strict=True)})

    @cached_property
    def base(self) -> "RunContext | ImportedBase | None":
        """The run whose model this one expands further; None if it starts from a dense model.

        Raises:
            UserError: it is not where its settings say.
        """
        imported = ImportedBase.of(self.run)
        if self.run.base is None or imported is not None:
            return imported
        folder = self.run.base.run
        run = load_run(folder / RUN_FILE)
        if run.folder.resolve() != folder.resolve():
            raise UserError(f"base.run: {folder} was moved: its {RUN_FILE} says {run.folder}; move it back")
        if run.method.is_dense:
            raise UserError(f"base.run: {folder} is a baseline, {run.method.name}; name a run that has experts")
        if run.model.tokenizer != self.run.model.tokenizer:
            raise UserError(
                f"model.tokenizer: {self.run.model.tokenizer} is not {run.model.tokenizer}, which base.run {folder} "
                "has; a tokenizer can be extended only in the first expansion: leave model out"
            )
        return RunContext(run)

    @cached_property
    def start_model(self) -> "Scored":
        """The model that the run starts from: the dense one, or its base run's checkpoint.

        Raises:
            UserError: there is no such checkpoint.
        """
        from pipeline.evaluation.checkpoints import Scored, checkpoint_to_score

        base = self.base
        if base is None or self.run.base is None:
            return Scored(BASE, (), {"dense": self.model_hash}, by_own_tokenizer=True)
        if isinstance(base, ImportedBase):
            return base.start_model
        label = self.run.base.checkpoint or base.stages[-1]
        folders = {stage: base.folder / stage for stage in base.stages}
        identities = {number: base.identity(number) for number in base.run.stage_numbers}
        return replace(checkpoint_to_score(folders, label, identities, base.untrained), label=BASE)

    @cached_property
    def start(self) -> str:
        """A content key of :attr:`start_model`."""
        if self.base is None:
            return self.model_hash
        return content_key({"model": self.model_hash, "base": self.start_model.weights})

    @property
    def backend(self) -> Backend:
        """What the text is prepared by: this process's pool, or tasks that srun has started on several nodes."""
        return "array" if shares_an_srun() else "local"

    @cached_property
    def planned(self) -> Planned:
        """Which token sets the run wants."""
        return plan_preparation(self.run.preparation, self.backend, self.kept)

    @cached_property
    def store(self) -> TokenStore:
        """The tokens, which must be there."""
        keys = self.folder.manifest("tokenize").outputs["sets"]
        return TokenStore(self.run.cache_dir / "tokens", self.run.data, keys)

    @cached_property
    def kept(self) -> dict[str, str]:
        """By set, the keys of the token sets that training has begun with: they stay, whatever is scored later."""
        has_begun = any((self.folder / stage).is_dir() for stage in self.stages)
        if not has_begun or not self.folder.has_manifest("tokenize"):
            return {}
        return dict(self.folder.manifest("tokenize").outputs["sets"])

    @cached_property
    def plan(self) -> ExpertPlan:
        """The expert plan, which must be there; where a dense model trains, one without new experts."""
        if self.run.method.is_dense:
            from pipeline.method.allocation import dense_plan
            from pipeline.model.model_folder import model_config

            return dense_plan(self.run, model_config(self.dense).get_text_config().num_hidden_layers)
        self.folder.manifest("allocate")
        return ExpertPlan.load(self.folder / PLAN_FILE)

    @cached_property
    def upcycled(self) -> Path:
        """The upcycled checkpoint, which must be there."""
        return self.run.cache_dir / "upcycled" / self.folder.manifest("upcycle").outputs["upcycled"]

    @cached_property
    def untrained(self) -> "Untrained":
        """What the checkpoints of the run's stages are laid over; it must be there."""
        from pipeline.method.untrained import UntrainedDense, UntrainedMixture

        if self.run.method.is_dense:
            return UntrainedDense(self.dense, self.model_hash, self.run.method, self.run.seed)
        return UntrainedMixture(self.upcycled, self.plan)

    @cached_property
    def dtype(self) -> "torch.dtype":
        """What the model is computed in."""
        from pipeline.training.ds_config import read_ds_config, training_dtype

        return training_dtype(read_ds_config(self.run.ds_config_file))

    @cached_property
    def dims(self) -> "ParallelDims":
        """How the ranks that this process has joined are divided, chosen once; all of them must ask for it."""
        from pipeline.distributed.process_group import join
        from pipeline.estimate.divide import divide

        return divide(self.run, join())

    def stage(self, number: int) -> "Stage":
        """A stage of the method, with the run's settings.

        Raises:
            UserError: the run has no such stage.
        """
        from pipeline.method.stages import find_stage

        return find_stage(self.run, number)

    def identity(self, number: int) -> CheckpointIdentity:
        """What the checkpoints of a stage are of."""
        plan = self.stage(number).plan_key(self.plan)
        return CheckpointIdentity(model=self.start, plan=plan, tokenizer=self.store.tokenizer_key)

    @property
    def stages(self) -> list[str]:
        """The names of the stages that the run has."""
        return [f"stage{number}" for number in self.run.stage_numbers]

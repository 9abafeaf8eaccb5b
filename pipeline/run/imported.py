"""A base that was imported from an exported folder, rather than trained here."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import sha256_file
from pipeline.config.experts import model_of_base
from pipeline.config.run import RunConfig
from pipeline.model.expert_plan import ExpertPlan
from pipeline.records.evaluation import BASE
from pipeline.records.expansion import IMPORTED_FILE, Imported
from pipeline.records.run_folder import PLAN_FILE, UPCYCLED

if TYPE_CHECKING:
    from pipeline.evaluation.checkpoints import Scored


@dataclass(frozen=True)
class ImportedBase:
    """What a further expansion asks of its base; see :attr:`pipeline.run.context.RunContext.base`.

    Attributes:
        path: the imported folder.
    """

    path: Path

    @classmethod
    def of(cls, run: RunConfig) -> "ImportedBase | None":
        """The imported base of a run; None if its base is a run.

        Raises:
            UserError: the run wants another checkpoint or tokenizer than the folder has.
        """
        if run.base is None or not (run.base.run / IMPORTED_FILE).is_file():
            return None
        if run.base.checkpoint:
            raise UserError(
                f"base.checkpoint: {run.base.checkpoint}, but {run.base.run} was imported and has one checkpoint "
                "alone; leave it out"
            )
        tokenizer = model_of_base(run.base.run)["tokenizer"]
        if run.model.tokenizer != tokenizer:
            raise UserError(
                f"model.tokenizer: {run.model.tokenizer} is not {tokenizer}, which base.run {run.base.run} has; a "
                "tokenizer can be extended only in the first expansion: leave model out"
            )
        return cls(run.base.run)

    @cached_property
    def plan(self) -> ExpertPlan:
        """Of its experts."""
        return ExpertPlan.load(self.path / PLAN_FILE)

    @property
    def upcycled(self) -> Path:
        """An upcycled checkpoint that holds all trained weights."""
        return self.path / UPCYCLED

    @property
    def start_model(self) -> "Scored":
        """The model that was imported."""
        from pipeline.checkpoint.store import MANIFEST
        from pipeline.evaluation.checkpoints import Scored
        from pipeline.method.untrained import UntrainedMixture

        known = Imported.load(self.path / IMPORTED_FILE)
        weights = {"imported": sha256_file(self.upcycled / MANIFEST)}
        untrained = UntrainedMixture(self.upcycled, self.plan, fix="import it again")
        return Scored(BASE, (), weights, known.has_classifiers, untrained)

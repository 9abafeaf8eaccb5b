"""What one step of a run is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from pipeline.config.cluster import JobName
from pipeline.config.run import RunConfig
from pipeline.records.step_manifest import StepInputs
from pipeline.run.changes import differences, explain
from pipeline.run.context import RunContext

if TYPE_CHECKING:
    from pipeline.distributed.process_group import Ranks

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a step leaves in its manifest.

    Attributes:
        outputs: what later steps find the result by.
        figures: what it took and gave; ``seconds`` is added unless it is there.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def always(_value: Any) -> bool:
    """The default of a step's conditions."""
    return True


def nothing_to_say(_run: RunConfig) -> str:
    """The default of what is said of a step that a run does not have."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. The command line, ``run``, SLURM's jobs, ``status`` and the report derive from a list of these.

    Attributes:
        name: in manifests, ``--until`` and lines.
        verb: of the command line, if it is not the name: the stages share one.
        does: what it does, for ``--help``.
        reads: what it reads, for ``--help``.
        writes: what it writes, for ``--help``.
        job: the SLURM job that does it.
        inputs: all that its result depends on; nothing else makes it stale. Token sets stand under ``sets``.
        work: does it; with the ranks, on each of them, where it needs ranks. None where it stopped before its end.
        applies: whether the run has the step.
        without: why a run does not have it; empty if that need not be said.
        is_there: whether what it has left in the cache is still there.
        may_grow: whether sets that were added are simply added: nothing is thrown away.
        needs_ranks: whether it is done on ranks.
        has_work: whether ranks have anything to compute; what they have computed is put together without them.
        alone: whether ``run`` does it in a process of its own, so that its memory is given back.
        keeps_manifest: whether it is done once, rather than each time.
        check: what can be known before any rank starts; raises UserError.
    """

    name: str = field(kw_only=False)
    verb: str = ""
    does: str
    reads: str
    writes: str
    job: JobName
    inputs: Callable[[RunContext], Inputs]
    work: "Callable[[RunContext, Ranks | None], Result | None]"
    applies: Callable[[RunConfig], bool] = always
    without: Callable[[RunConfig], str] = nothing_to_say
    is_there: Callable[[RunContext], bool] = always
    may_grow: bool = False
    needs_ranks: bool = False
    has_work: Callable[[RunContext], bool] = always
    alone: bool = False
    keeps_manifest: bool = True
    check: Callable[[RunContext], None] | None = None

    def __post_init__(self) -> None:
        """A step's verb is its name unless it says otherwise."""
        object.__setattr__(self, "verb", self.verb or self.name)

    @property
    def help(self) -> str:
        """What ``--help`` says of its verb."""
        return f"{self.does}.\nReads {self.reads}; writes {self.writes}."

    def is_done(self, context: RunContext) -> bool:
        """Whether there is nothing to do; says so unless the context is quiet.

        Raises:
            UserError: it was done with other inputs.
        """
        if not self.applies(context.run):
            reason = self.without(context.run)
            if reason and not context.quiet:
                print(f"{self.name}: {reason}, skipped", flush=True)
            return True
        if not self.keeps_manifest:
            return False
        done = self._is_done_with_these_inputs(context) and not context.redo and self.is_there(context)
        if done and not context.quiet:
            print(f"{self.name}: done, skipped", flush=True)
        return done

    def _is_done_with_these_inputs(self, context: RunContext) -> bool:
        before, now = context.folder.inputs_of(self.name), self.done_with(context)
        if before is None:
            return False
        is_done, changes = context.folder.has_manifest(self.name), differences(before.inputs, now.inputs)
        if changes and not context.force and not (self.may_grow and all(c.adds_or_removes_a_set for c in changes)):
            lines = explain(self.name, changes, before.run, now.run)
            raise UserError(
                f"{self.name}: {'done' if is_done else 'begun'} in {context.folder.path} with other inputs: "
                f"{'; '.join(lines[:3])}{' and more' if len(lines) > 3 else ''}. Add --force to do it again, or give "
                "the run another name"
            )
        return is_done and not changes

    def done_with(self, context: RunContext) -> StepInputs:
        """Its inputs, for its manifest."""
        return StepInputs(inputs=self.inputs(context), run=context.settings)

"""Text sets to a TokenStore in the cache: planned, worked out by whatever executor there is, and done once."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from data_prep.config import DataConfig
from data_prep.executor.launch import Backend, open_executor
from data_prep.executor.pool import PoolExecutor
from data_prep.filters import Filters
from data_prep.make_plan import Inputs, Planned, check_tokenizer, make_plan
from data_prep.phases.order import run_phases
from data_prep.plan import Work, forget_plans
from data_prep.reading.sources import source_files
from data_prep.statistics.summary import print_summary
from data_prep.store import MANIFEST, TokenStore
from pipeline.config.run import RunConfig

SMALL_BYTES = 32 << 20  # of files: less is not worth starting processes for


def prepare_run(
    run: RunConfig,
    backend: Backend = "auto",
    workers: int | None = None,
    *,
    force: bool = False,
    planned: Planned | None = None,
) -> TokenStore | None:
    """`prepare` for a whole run: its tokenizer (the model's, unless `data.tokenizer` names one) and vocabulary.

    Args:
        planned: what `plan_run` gave, where it is known already.
    """
    return _prepare(_inputs(run), backend, workers, force, planned)


def plan_run(run: RunConfig, backend: Backend = "local") -> Planned:
    """The plan of a run's tokens, with the folder that `prepare_run` puts them in, whether they are there or not."""
    inputs = _inputs(run)
    with open_executor(backend, _workers(inputs.data, None)) as executor:
        assert executor is not None
        return make_plan(inputs, executor)


def _inputs(run: RunConfig) -> Inputs:
    revision = run.model.revision if run.data.tokenizer is None else None
    tokenizer = run.data.tokenizer or run.model.path
    return Inputs(run.data, tokenizer, _vocab_size(run), run.cache_dir, run.seed, revision, run.stage1.tokens)


def prepare(
    data: DataConfig,
    tokenizer_path: str,
    vocab_size: int,
    cache_dir: Path,
    seed: int,
    revision: str | None = None,
    *,
    stage1_tokens: int | None = None,
    workers: int | None = None,
) -> TokenStore:
    """Tokenize every set into `cache_dir/tokens/<content key>/` on this machine, unless that has been done.

    Args:
        tokenizer_path: a folder or hub id (with `revision`), or a SentencePiece file.
        vocab_size: of the model: ids must be below it.
        seed: of the choice of held-out documents, of what budgets take and of replay.
        stage1_tokens: what `data.replay.share` is a share of; without it a share is no limit.
        workers: processes; by default one a core, or none for little text.

    Raises:
        UserError: a source, the tokenizer or a setting won't do; it names the file and row, or the key.
    """
    inputs = Inputs(data, tokenizer_path, vocab_size, cache_dir, seed, revision, stage1_tokens)
    store = _prepare(inputs, "local", workers, force=False)
    assert store is not None
    return store


def _prepare(
    inputs: Inputs, backend: Backend, workers: int | None, force: bool, planned: Planned | None = None
) -> TokenStore | None:
    """The store; None in an MPI rank that did tasks for another."""
    with open_executor(backend, _workers(inputs.data, workers)) as executor:
        if executor is None:
            return None
        inputs.cache_dir.mkdir(parents=True, exist_ok=True)
        planned = planned or make_plan(inputs, executor)
        check_tokenizer(inputs, planned.encoder, force)
        return _work_out(planned, executor)


def _workers(data: DataConfig, wanted: int | None) -> int | None:
    """One, this process with its libraries' threads, where there is little text."""
    if wanted is not None:
        return wanted
    sources = [source for entry in data.sets.values() for source in entry.source_list]
    if any(source.hub is not None for source in sources):
        return None
    try:
        size = sum(file.stat().st_size for source in sources for file in source_files(source))
    except UserError:
        return 1  # it will be met again, and named, when the plan is made
    return 1 if size < SMALL_BYTES else None


def _work_out(planned: Planned, executor: PoolExecutor) -> TokenStore:
    plan, folder = planned.plan, planned.folder
    work = Work(folder.with_name(f".{folder.name}.work"))
    with _lock(folder, shared=executor.claim is not None):
        if (folder / MANIFEST).is_file():
            shutil.rmtree(work.folder, ignore_errors=True)
            if executor.show:
                print(f"tokens: {folder} is there already, skipped", flush=True)
            return TokenStore(folder)
        if plan.fraction < plan.data.held_out.fraction and executor.show:
            print(
                f"tokens: data.held_out.fraction is lowered to {plan.fraction:.2g}, so that no more than "
                f"data.held_out.max_megabytes={plan.data.held_out.max_megabytes} of text are held out",
                flush=True,
            )
        for name, entry in {**plan.data.old, **plan.data.new}.items():
            Filters(plan.data.filters, entry, name)  # an unknown language is named before any work is done
        forget_plans()
        if not (work.folder / "plan.json").is_file():
            planned.encoder.save(work.folder)
            plan.save(work.folder / "plan.json")
        try:
            run_phases(work, executor)
        except (OSError, UserError):
            if executor.claim is None or not work.is_finished:  # else another job was faster, and has cleaned up
                raise
        store = TokenStore(folder)
        shutil.rmtree(work.folder, ignore_errors=True)
    if executor.show:
        print_summary(store)
    share = "" if executor.is_alone else f"{executor.tasks_done} tasks done on {os.uname().nodename}, "
    print(f"tokens: {folder} ({share}peak memory of a process {executor.peak_memory / 1e9:.2f} GB)", flush=True)
    return store


@contextmanager
def _lock(folder: Path, *, shared: bool) -> Iterator[None]:
    """Two runs that want the same tokens take turns: the second finds them done. Jobs that share the work do not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"tokens: another run writes {folder}, waiting", flush=True)
            fcntl.flock(file, kind)
        yield


def _vocab_size(run: RunConfig) -> int:
    """The vocabulary of the run's model, from its configuration."""
    from transformers import AutoConfig

    path = run.model.path
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"model.path: {path} is no folder; name one with a model, or a hub id")
    try:
        config = AutoConfig.from_pretrained(path, revision=run.model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path: no model configuration at {path} ({reason}); name a folder, or a hub id, which "
            "python -m pipeline fetch RUN.yaml downloads"
        ) from error
    return int(config.get_text_config().vocab_size)

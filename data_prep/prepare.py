"""Text to the sets of a run in the cache: planned, worked out by whatever executor there is, and done once."""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

from common.errors import UserError
from common.files import content_key, read_json
from common.locks import locked
from data_prep.config import DataConfig, PreparationConfig, SourceConfig
from data_prep.executor.launch import Backend, open_executor
from data_prep.executor.pool import PoolExecutor
from data_prep.filters import Filters
from data_prep.make_plan import Planned, check_tokenizer, make_plan, plan_of
from data_prep.phases.order import run_phases
from data_prep.plan import Plan
from data_prep.reading.hub import is_folder
from data_prep.reading.sources import source_files, unread_line
from data_prep.statistics.summary import print_short_caps, print_summary
from data_prep.store import TokenStore
from data_prep.work import Work, copies_record

SMALL_BYTES = 32 << 20  # of files: less is not worth starting processes for


def plan_preparation(config: PreparationConfig, backend: Backend = "local", keep: Mapping[str, str] = {}) -> Planned:
    """What a run wants of the cache: the key of each of its sets, whether they are there or not.

    Args:
        config: what the run says of its text.
        backend: what runs the tasks: files that are new are hashed.
        keep: see `Planned`.
    """
    with open_executor(backend, _workers(config.data, None)) as executor:
        assert executor is not None
        return make_plan(config, executor, keep)


def prepare(
    config: PreparationConfig,
    backend: Backend = "auto",
    workers: int | None = None,
    *,
    force: bool = False,
    planned: Planned | None = None,
) -> TokenStore | None:
    """Prepare the sets of a run that are not in the cache; the others are left alone.

    Args:
        config: what the run says of its text.
        backend: what runs the tasks.
        workers: processes on this machine; by default one per core, or only this one for little text.
        force: accept a tokenizer that has changed.
        planned: what `plan_preparation` gave, where it is known already. A set that it keeps is taken as it is; its
            copies of texts that it was not cleaned of are counted.

    Returns:
        The sets; None in an MPI rank that did tasks for another.

    Raises:
        UserError: a source, the tokenizer or a setting can't be used; it names the file and row, or the key.
    """
    with open_executor(backend, _workers(config.data, workers)) as executor:
        if executor is None:
            return None
        config.cache_dir.mkdir(parents=True, exist_ok=True)
        planned = planned or make_plan(config, executor, {})
        check_tokenizer(config, planned.encoder, force)
        has_worked = _work_out(planned, executor)
    store = TokenStore(planned.tokens, config.data, planned.kept_keys)
    if executor.show:
        page = _write_page(store, has_worked)
        if has_worked:
            print_summary(store)
            print_short_caps(planned, store)
            print(f"tokens: {len(store.sets)} sets in {planned.tokens}, their figures in {page}", flush=True)
        _say_copies(planned)
    if has_worked:
        share = "" if executor.is_alone else f"{executor.tasks_done} tasks done on {os.uname().nodename}, "
        print(f"tokens: {share}peak memory of a process {executor.peak_memory / 1e9:.2f} GB", flush=True)
    return store


def _workers(data: DataConfig, wanted: int | None) -> int | None:
    """One, this process with its libraries' threads, where there is little text."""
    if wanted is not None:
        return wanted
    sources = [source for entry in data.sets.values() for source in entry.source_list]
    if any(source.hub is not None and not is_folder(source.hub) for source in sources):
        return None
    size = 0
    try:
        for file in (file for source in sources for file in _files(source)):
            size += file.stat().st_size
            if size >= SMALL_BYTES:
                return None
    except UserError:
        pass  # it will be met again, and named, when the plan is made
    return 1


def _files(source: SourceConfig) -> Iterable[Path]:
    """Of a dataset in a folder all that lie there, since its card says which are read."""
    if source.hub is None:
        return source_files(source)
    return (path for path in Path(source.hub).rglob("*") if path.is_file())


def _work_out(planned: Planned, executor: PoolExecutor) -> bool:
    """Prepare what is missing; returns whether anything was."""
    keys = [sorted({one.key for one in planned.sets}), planned.kept_keys]
    work = Work(planned.tokens / f".{content_key(keys)}.work")  # the same for all jobs that share the work
    waiting = f"tokens: another run works in {work.folder}, waiting"
    # Jobs that claim tasks share the work.
    with locked(work.folder.with_suffix(".lock"), waiting) if executor.is_alone else nullcontext():
        plan = plan_of(planned)
        is_begun = (work.folder / "plan.json").is_file()
        if not is_begun and not plan.kept and not any(one.is_written for one in plan.sets):
            if executor.show:
                print(f"tokens: {', '.join(planned.keys)}: there already, skipped", flush=True)
            shutil.rmtree(work.folder, ignore_errors=True)  # what is left of it where its removal was interrupted
            return False
        if executor.show:
            _say_fraction(plan)
            _say_unread(plan)
        for one in plan.sets:
            if one.trains:
                Filters(plan.data.filters, one.entry, one.name)  # an unknown language is named before any work is done
        planned.encoder.save(work.folder)
        if planned.encoders.own is not None:
            planned.encoders.own.save(work.own_tokenizer)
        plan.save(work.folder / "plan.json")
        try:
            run_phases(work, executor)
        except (OSError, UserError):
            if not work.is_finished:  # else another job was faster, and has cleaned up
                raise
        shutil.rmtree(work.folder, ignore_errors=True)
    return True


def _say_fraction(plan: Plan) -> None:
    if plan.fraction < plan.data.held_out.fraction:
        print(
            f"tokens: data.held_out.fraction is lowered to {plan.fraction:.2g}, so that no more than "
            f"data.held_out.max_megabytes={plan.data.held_out.max_megabytes} of text are held out",
            flush=True,
        )


def _say_unread(plan: Plan) -> None:
    """One line for each folder of the sets that are prepared, if it has files of an unknown format."""
    sources = [source for one in plan.sets if one.is_written for source in one.entry.source_list]
    for path in dict.fromkeys(source.path for source in sources if source.path is not None):
        line = unread_line(path)
        if line is not None:
            print(f"tokens: {line}", flush=True)


def _write_page(store: TokenStore, has_worked: bool) -> Path:
    """The page of a run's sets, named by their list; a page that is there is good unless a set is new."""
    from data_prep.statistics.page import write_page  # plotly, which is seldom needed, takes a second to import

    languages = {name: entry.language for name, entry in store.data.sets.items()}
    path = store.folder / f"{content_key([store.keys, languages])}.html"
    if has_worked or not path.is_file():
        write_page(store, path)
    return path


def _say_copies(planned: Planned) -> None:
    """One line on the copies in kept sets of text they were not cleaned of."""
    kept = {one.key: one for one in planned.kept_sets}
    if not kept:
        return
    names = {key: name for name, key in planned.kept_keys.items() if key in kept}
    texts = {one.text: one.name for one in reversed(planned.sets)}
    counts: dict[str, int] = {}
    of_names: set[str] = set()
    for key, name in names.items():
        found = read_json(copies_record(planned.tokens, kept[key].record))
        counts[name] = found["documents"]
        of_names.update(texts[text] for text in found["by_text"])
    total = sum(counts.values())
    trained = ", ".join(f"{name} ({count:,})" for name, count in counts.items() if count)
    if total:
        print(
            f"warning: training sees {total:,} {'copy' if total == 1 else 'copies'} of text in "
            f"{', '.join(sorted(of_names))}, in the training documents of {trained}: these sets are kept as they were "
            "when training began",
            flush=True,
        )
    else:
        print(f"tokens: 0 copies of new held-out text in the kept training sets {', '.join(counts)}", flush=True)

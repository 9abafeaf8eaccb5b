"""The tokenize step: the run's text sets to a TokenStore in the cache, done once for the same content."""

import fcntl
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.hashes import RememberedHashes
from data_prep.held_out import NearCopies
from data_prep.set_writer import SetTask, scan, write_set
from data_prep.sources import Source, format_of, source_files
from data_prep.store import MANIFEST, SetManifest, SourceFile, StoreManifest, TokenStore
from data_prep.tokenize import DocumentEncoder, choose_dtype
from pipeline.config import DataConfig, RunConfig
from pipeline.errors import UserError
from pipeline.files import content_key, new_folder, sha256_file, write_json

FORMAT_VERSION = 1  # part of the content key: raise it when the same inputs give other shards
PACKAGES = "tokenizers", "transformers", "datasketch", "numpy"


def prepare_run(run: RunConfig) -> TokenStore:
    """`prepare` for a whole run: its tokenizer (the model's, unless `data.tokenizer` names one) and vocabulary."""
    revision = run.model.revision if run.data.tokenizer is None else None
    tokenizer = run.data.tokenizer or run.model.path
    return prepare(run.data, tokenizer, _vocab_size(run), run.cache_dir, run.seed, revision)


def tokens_folder(run: RunConfig) -> Path:
    """Where `prepare_run` puts a run's tokens, whether they are there yet or not."""
    revision = run.model.revision if run.data.tokenizer is None else None
    vocab_size = _vocab_size(run)
    dtype = choose_dtype(run.data.token_dtype, vocab_size)
    encoder = DocumentEncoder(run.data.tokenizer or run.model.path, run.data.separator, vocab_size, revision)
    sources = _sources(run.data, run.cache_dir)
    return _folder(run.cache_dir, _settings(run.data, sources, encoder.key, dtype, run.seed))


def _folder(cache_dir: Path, settings: dict[str, Any]) -> Path:
    return cache_dir / "tokens" / content_key(settings)


def prepare(
    data: DataConfig, tokenizer_path: str, vocab_size: int, cache_dir: Path, seed: int, revision: str | None = None
) -> TokenStore:
    """Tokenize every set into `cache_dir/tokens/<content key>/`, unless that has been done.

    Args:
        tokenizer_path: a folder or hub id (with `revision`).
        vocab_size: of the model: ids must be below it.
        seed: of the choice of held-out documents.

    Raises:
        UserError: a source, the tokenizer or a setting won't do; it names the file and row, or the key.
    """
    dtype = choose_dtype(data.token_dtype, vocab_size)
    encoder = DocumentEncoder(tokenizer_path, data.separator, vocab_size, revision)
    cache_dir.mkdir(parents=True, exist_ok=True)
    sources = _sources(data, cache_dir)
    settings = _settings(data, sources, encoder.key, dtype, seed)
    folder = _folder(cache_dir, settings)
    with _lock(folder):
        if (folder / MANIFEST).is_file():
            print(f"tokens: {folder} is there already, skipped", flush=True)
            return TokenStore(folder)
        with new_folder(folder) as temporary:
            sets = _write_sets(data, encoder, dtype, seed, sources, temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest = StoreManifest(
                key=folder.name,
                tokenizer=tokenizer_path,
                tokenizer_key=encoder.key,
                separator=encoder.separator,
                separator_id=encoder.separator_id,
                bos_id=encoder.bos_id,
                dtype=dtype,
                settings=settings,
                sets=sets,
                files={str(path.relative_to(temporary)): sha256_file(path) for path in files},
                versions={name: importlib.metadata.version(name) for name in PACKAGES},
            )
            write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
    print(f"tokens: {folder}", flush=True)
    return TokenStore(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Two runs that want the same tokens take turns: the second finds them done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"tokens: another run writes {folder}, waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sources(data: DataConfig, cache_dir: Path) -> dict[str, list[SourceFile]]:
    """The files of each set with their hashes; an error names the set."""
    hashes = RememberedHashes(cache_dir / "hashes.json")
    sources = {}
    for name, entry in data.sets.items():
        try:
            files = source_files(Path(entry.path))
        except UserError as error:
            raise UserError(f"data.{data.group(name)}.{name}.path: {error}") from error
        sources[name] = [
            SourceFile(path=str(file), sha256=sha256, bytes=file.stat().st_size)
            for file, sha256 in zip(files, hashes.sha256(files), strict=True)
        ]
    return sources


def _settings(
    data: DataConfig, sources: dict[str, list[SourceFile]], tokenizer_key: str, dtype: str, seed: int
) -> dict[str, Any]:
    """All that the shards' content depends on, and nothing else: no paths, no names of runs."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_key,
        "dtype": dtype,
        "seed": seed,
        "held_out": data.held_out.model_dump(mode="json"),
        "sets": {
            name: {
                "group": data.group(name),
                "language": entry.language or name,
                "text_field": entry.text_field,
                "files": [[format_of(Path(file.path)), file.sha256] for file in sources[name]],
            }
            for name, entry in data.sets.items()
        },
    }


def _write_sets(
    data: DataConfig,
    encoder: DocumentEncoder,
    dtype: str,
    seed: int,
    sources: dict[str, list[SourceFile]],
    folder: Path,
) -> dict[str, SetManifest]:
    """Two passes over the text: first to know all that is held out of any set, then to write."""
    page_field = None if data.held_out.by == "document" else data.held_out.by
    near_copies = NearCopies(data.held_out.near_copy_threshold)
    tasks, sizes = {}, {}
    for name, entry in data.sets.items():
        group = data.group(name)
        source = Source(Path(entry.path), entry.text_field, page_field, page_required=group != "watch")
        tasks[name] = SetTask(name, group, source, seed, data.held_out.fraction)
        sizes[name] = scan(tasks[name], near_copies)
    sets = {}
    for name, task in tasks.items():
        train, held_out, dropped = write_set(task, encoder, dtype, near_copies, sizes[name], folder / name)
        sets[name] = SetManifest(
            group=task.group,
            language=data.sets[name].language or name,
            sources=sources[name],
            train=train,
            held_out=held_out,
            dropped=dropped,
        )
    return sets


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
        raise UserError(f"model.path: no model configuration at {path} ({reason}); name a folder or hub id") from error
    return int(config.get_text_config().vocab_size)

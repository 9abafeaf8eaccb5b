"""Ways to make token files of .jsonl text, each run in a process of its own: what it does, and what that costs.

python -m benchmarks.data_prep_rivals NAME TOKENIZER FOLDER CORES FILE…   prints {"cpu", "wall", "tokens"}

The clock starts when a rival's modules are loaded and stops when its files are written; CPU time includes all of its
processes. Every one ends each document with the same separator, and holds out nothing or next to nothing.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

SEPARATOR = "<|endoftext|>"
NOT_INSTALLED = 3
Loaded = Callable[[], int]  # does the work, and returns the number of tokens


class Job(NamedTuple):
    """What to do: the tokenizer's folder, where to write, how many cores, and the files."""

    tokenizer: str
    folder: Path
    cores: int
    files: list[str]


def texts(files: list[str]) -> Iterator[str]:
    """The texts of .jsonl files."""
    for file in files:
        with open(file, encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)["text"]


def floor(job: Job) -> Loaded:
    """The least: encode_batch_fast straight into uint16, with the library's threads where there are cores."""
    import numpy as np
    from tokenizers import Tokenizer

    def run() -> int:
        tokenizer = Tokenizer.from_file(f"{job.tokenizer}/tokenizer.json")
        end = tokenizer.token_to_id(SEPARATOR)
        count = 0
        source = texts(job.files)
        with open(job.folder / "floor.bin", "wb") as target:
            while batch := list(islice(source, 256)):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array([*encoding.ids, end], np.uint16)
                    count += ids.size
                    target.write(ids.tobytes())
        return count

    return run


def _load_transformers(job: Job) -> None:
    """Load what a tokenizer needs of transformers, which loads its modules when they are first used."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(job.tokenizer)


def _ours(job: Job, **changes: Any) -> Loaded:
    import data_prep.statistics.page  # noqa: F401 - loaded before the clock starts
    from data_prep.config import PreparationConfig
    from data_prep.prepare import prepare

    _load_transformers(job)

    def run() -> int:
        # Held-out documents are wanted of every set: one in a hundred, which are tokenized as the others are.
        tree: dict[str, Any] = {"held_out": {"fraction": 0.01, "near_copy_threshold": None}}
        tree["new"] = {Path(file).stem: {"path": file, "language": Path(file).stem} for file in job.files}
        settings = {"model": {"path": job.tokenizer}, "cache_dir": job.folder / "cache", "data": tree | changes}
        sys.stdout, shown = sys.stderr, sys.stdout
        try:
            store = prepare(PreparationConfig.model_validate(settings), "local", job.cores)
        finally:
            sys.stdout = shown
        assert store is not None
        manifests = [one.manifest for one in store.sets.values()]
        return sum(found.held_out.tokens + (found.train.tokens if found.train else 0) for found in manifests)

    return run


def ours(job: Job) -> Loaded:
    """This product: hashes of sources and shards, manifest, statistics and all."""
    return _ours(job)


def ours_clean(job: Job) -> Loaded:
    """This product with contamination and near-duplicate search, normalisation and length filter."""
    filters = {"normalize": "NFC", "min_characters": 20, "exact_duplicates": True, "near_duplicates": {}}
    return _ours(job, held_out={"fraction": 0.01}, filters=filters)


def datasets_map(job: Job) -> Loaded:
    """datasets.map over a transformers tokenizer, as the papers' code does; ends in arrow files."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    _load_transformers(job)

    def run() -> int:
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        end = tokenizer.convert_tokens_to_ids(SEPARATOR)

        def encode(batch: dict[str, Any]) -> dict[str, Any]:
            encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
            return {"input_ids": [[*ids, end] for ids in encoded["input_ids"]]}

        table = load_dataset("json", data_files=job.files, split="train", cache_dir=str(job.folder))
        done = table.map(
            encode, batched=True, remove_columns=table.column_names, num_proc=job.cores if job.cores > 1 else None
        )
        import pyarrow.compute as pc

        return int(pc.sum(pc.list_value_length(done.data.column("input_ids"))).as_py())

    return run


def datatrove(job: Job) -> Loaded:
    """datatrove's DocumentTokenizer, a task a file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def run() -> int:
        pipeline = [
            JsonlReader(str(Path(job.files[0]).parent), glob_pattern="*.jsonl"),
            DocumentTokenizer(
                str(job.folder / "out"),
                tokenizer_name_or_path=f"{job.tokenizer}/tokenizer.json",
                eos_token=SEPARATOR,
                shuffle_documents=False,
            ),
        ]
        sys.stdout, shown = sys.stderr, sys.stdout
        try:
            LocalPipelineExecutor(
                pipeline, tasks=len(job.files), workers=job.cores, logging_dir=str(job.folder / "logs")
            ).run()
        finally:
            sys.stdout = shown
        return sum(path.stat().st_size for path in (job.folder / "out").glob("*.ds")) // 2

    return run


_tokenizer: Any = None


def _begin(path: str) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(path)


def _encode_line(line: str) -> list[int]:
    ids = _tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*ids, _tokenizer.convert_tokens_to_ids(SEPARATOR)]


def megatron(job: Job) -> Loaded:
    """The loop of Megatron-LM's preprocess_data.py: a line at a time to a pool, into IndexedDatasetBuilder."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    _load_transformers(job)

    def run() -> int:
        builder = IndexedDatasetBuilder(str(job.folder / "theirs.bin"), dtype=np.uint16)
        count = 0
        with multiprocessing.get_context("fork").Pool(job.cores, _begin, (job.tokenizer,)) as pool:
            for file in job.files:
                with open(file, encoding="utf-8") as stream:
                    for ids in pool.imap(_encode_line, stream, 32):
                        builder.add_document(torch.IntTensor(ids), [len(ids)])
                        count += len(ids)
            pool.close()
            pool.join()
        builder.finalize(str(job.folder / "theirs.idx"))
        return count

    return run


class Rival(NamedTuple):
    """A way, and what it is called."""

    title: str
    load: Callable[[Job], Loaded]


RIVALS = {
    "floor": Rival("floor: encode_batch_fast into uint16", floor),
    "ours": Rival("ours", ours),
    "ours_clean": Rival("ours, with deduplication and other filters", ours_clean),
    "datasets": Rival("datasets.map", datasets_map),
    "datatrove": Rival("datatrove", datatrove),
    "megatron": Rival("Megatron's loop", megatron),
}


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> int:
    """Run one rival and print what it took."""
    name, tokenizer, folder, cores, *files = sys.argv[1:]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run = RIVALS[name].load(Job(tokenizer, Path(folder), int(cores), files))
    except ImportError as error:
        print(error, file=sys.stderr)
        return NOT_INSTALLED
    cpu, wall = cpu_seconds(), time.perf_counter()
    tokens = run()
    print(json.dumps({"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "tokens": tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Copies of held-out text: the index that training documents are compared with, and a count of those in kept sets."""

from collections import Counter

from common.files import write_json
from data_prep.dedup.held_out import SHINGLE, CopyIndex
from data_prep.dedup.word_shingles import shingles, word_hashes
from data_prep.manifest import SetManifest, read_manifest
from data_prep.phases.filter import held_out_runs
from data_prep.plan import Json, KeptSet
from data_prep.shards import Shard
from data_prep.tokenizer import load_decoder
from data_prep.work import Work

INDEX, COUNT = "copies", "count_copies"


def index_copies(work: Work, _task: int) -> Json:
    """Gather the held-out texts that training documents are compared with; returns how many "texts" there are."""
    return {"texts": CopyIndex.write(work.folder / INDEX, held_out_runs(work))}


def copy_index(work: Work) -> CopyIndex:
    """What `index_copies` wrote, opened once a process."""
    threshold = work.plan.data.held_out.near_copy_threshold
    assert threshold is not None, "no document is compared with held-out text"
    return work.once("copies", lambda: CopyIndex(work.folder / INDEX, threshold))


def kept_shards(work: Work) -> list[tuple[KeptSet, str]]:
    """The tasks of the count: every training shard of the kept sets."""
    return [(kept, shard) for kept in work.plan.kept for shard in kept.shards]


def count_copies(work: Work, task: int) -> Json:
    """Compare the documents of a shard of a kept set with the texts it was not cleaned of.

    Returns:
        "documents" that are a copy of any of them, and the copies "by_text" (the key of a text).
    """
    kept, name = kept_shards(work)[task]
    folder, copies = work.tokens / kept.key, copy_index(work)
    manifest = read_manifest(folder, SetManifest)
    decode = work.once(("decoder", kept.key), lambda: load_decoder(folder))
    begin = 0 if manifest.bos_id is None else 1
    shard, documents = Shard(folder / name), 0
    by_text: Counter[str] = Counter()
    for index in range(shard.num_documents):
        text = decode(shard.document(index)[begin:-1].tolist())
        found = [n for n in copies.origins(shingles(word_hashes(text), SHINGLE)) if n in kept.texts]
        documents += bool(found)
        by_text.update(work.plan.held_out_texts[number].text for number in found)
    return {"documents": documents, "by_text": dict(sorted(by_text.items()))}


def record_copies(work: Work) -> None:
    """Keep the counts beside the finished sets, for the next time that they are asked for."""
    figures = [(kept, work.figures(COUNT, task)) for task, (kept, _) in enumerate(kept_shards(work))]
    for one in work.plan.kept:
        mine = [found for kept, found in figures if kept == one]
        by_text: Counter[str] = Counter()
        for found in mine:
            by_text.update(found["by_text"])
        documents = sum(found["documents"] for found in mine)
        write_json(
            work.record(one), {"set": one.key, "documents": documents, "by_text": dict(sorted(by_text.items()))}
        )

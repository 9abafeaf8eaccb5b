"""How many samples of 1,024 tokens a CPU second gives, read in random order from files in the page cache."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import ShardSequence, ShardWriter
from pipeline.training.mixture import Source
from pipeline.training.sample_order import SampleOrder

LENGTH, NUM_TOKENS, NUM_SHARDS = 1024, 32 << 20, 4
READS, BATCH, ROUNDS = 100_000, 64, 5


def measure_reads() -> dict[str, float]:
    """Samples a CPU second of each way, the median over rounds; printed."""
    with tempfile.TemporaryDirectory() as name:
        ways = _ways(Path(name))
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (read, reads) in ways.items():
                started = time.process_time()
                read(reads)
                speeds[way].append(reads / (time.process_time() - started))
    print(f"\nrandom reads of {LENGTH:,} tokens a CPU second, median of {ROUNDS} rounds")
    found = {way: statistics.median(values) for way, values in speeds.items()}
    for way, value in found.items():
        print(f"{way:54} {value:10,.0f}", flush=True)
    return found


def _ways(folder: Path) -> dict[str, tuple[Callable[[int], Any], int]]:
    draw = np.random.default_rng(1)
    ids = draw.integers(0, 49152, NUM_TOKENS).astype(np.uint16)
    for number, part in enumerate(np.array_split(ids, NUM_SHARDS)):
        with ShardWriter(folder / f"{number}", "uint16") as writer:
            writer.append(part)
    shards = ShardSequence([folder / f"{number}" for number in range(NUM_SHARDS)], "uint16")
    order = SampleOrder([Source("el", shards, 1.0, False, 1)], sequence_length=LENGTH, num_samples=READS, seed=1)
    ids.tofile(folder / "raw.bin")
    raw = np.memmap(folder / "raw.bin", np.uint16, "r")
    starts = draw.integers(0, NUM_TOKENS - LENGTH, READS).tolist()

    def read_raw(reads: int) -> None:
        for start in starts[:reads]:
            np.array(raw[start : start + LENGTH])

    def read_shards(reads: int) -> None:
        for start in starts[:reads]:
            shards.read(start, start + LENGTH).copy()

    def read_order(reads: int) -> None:
        for first in range(0, reads, BATCH):
            order.read(first, min(BATCH, reads - first))

    ways: dict[str, tuple[Callable[[int], Any], int]] = {
        "raw memmap, uint16": (read_raw, READS),
        "ours, shards, uint16": (read_shards, READS),
        f"ours, in the order of samples, int64, batches of {BATCH}": (read_order, READS),
    }
    try:
        from datasets import Dataset
    except ImportError:
        return ways
    rows = ids[: NUM_TOKENS // 4].reshape(-1, LENGTH)
    Dataset.from_dict({"input_ids": list(rows)}).save_to_disk(str(folder / "arrow"))
    table = Dataset.load_from_disk(str(folder / "arrow")).with_format("numpy")

    def read_arrow(reads: int) -> None:
        for start in starts[:reads]:
            table[start % len(table)]["input_ids"]

    return ways | {"arrow, through datasets, numpy": (read_arrow, READS // 20)}


if __name__ == "__main__":
    measure_reads()

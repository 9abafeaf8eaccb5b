"""What a folder in the cache says of itself: its manifest, written last."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import read_json

MANIFEST = "manifest.json"
STATISTICS = "statistics.json"
HELD_OUT = "held_out"  # the shard of held-out documents, and its .jsonl
OWN_HELD_OUT = "held_out_own"  # the same two by the model's own tokenizer, where the run's extends it
RUNS, RUN_SIZES = "held_out_runs.npy", "held_out_sizes.npy"  # word runs of the held-out texts: see HeldOutRuns


class Part(BaseModel):
    """A part of what is written: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(Part):
    """How much text: `bytes` of UTF-8, Unicode `characters`, `tokens` with BOS and separators."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0


class Dropped(Part):
    """How much text was left out of training and out of the held-out part, and where the first of it stood."""

    documents: int = 0
    characters: int = 0
    examples: list[str] = []


class BadRowsReport(Part):
    """Rows that could not be read and were skipped: how many, and what was wrong with the first of them."""

    rows: int = 0
    examples: list[str] = []


class TrainShard(Part):
    """One shard of training documents: its prefix in the set's folder, and the number of the source it is from."""

    name: str
    source: int
    documents: int
    tokens: int


class SourceFile(Part):
    """One file that a set was read from; `path` is where it lay at the time. `source` is its source's number.

    Of a hub dataset, `path` says name, commit, config and split, and the hash names that content.
    """

    path: str
    sha256: str
    bytes: int
    source: int = 0


class TextManifest(Part):
    """What every folder in the cache says of itself; of a benchmark, all of it.

    `settings` is what `key` was made from. `dropped` is by reason: "empty", "too_short", "too_long", "language",
    "exact_duplicate", "near_duplicate", "near_copy" (of a held-out text), "benchmark" (a copy of one), "over_budget"
    (the rest of the slice that a budget cuts). `files` maps each file's path in the folder to its sha256; `versions`
    are of packages.
    """

    key: str
    settings: dict[str, Any]
    sources: list[SourceFile]
    dropped: dict[str, Dropped]
    bad_rows: BadRowsReport = BadRowsReport()
    held_out: Counts
    files: dict[str, str]
    versions: dict[str, str]


class SetManifest(TextManifest):
    """What the folder of a set says of itself. `train` is None for a set that is only scored.

    `own_tokenizer_key` is of the model's own tokenizer where the run's extends it: the folder then has the held-out
    documents by both.

    A budget takes whole slices until it is reached; `slices_beyond_budget` of `slices` it did not come to.
    """

    tokenizer: str
    tokenizer_key: str
    own_tokenizer_key: str | None = None
    separator: str
    separator_id: int
    bos_id: int | None
    dtype: Literal["uint16", "int32"]
    train: Counts | None
    shards: list[TrainShard] = []
    slices: int
    slices_beyond_budget: int


Manifest = TypeVar("Manifest", bound=TextManifest)


def read_manifest(folder: Path, kind: type[Manifest]) -> Manifest:
    """The manifest of a folder in the cache.

    Raises:
        UserError: there is none (preparing was interrupted), or one of another form.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: missing, so these tokens are not complete; run tokenize again")
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path}: not a manifest of this version (at {where}); delete its folder and run tokenize again"
        ) from error

"""The result of tokenizing: a folder of shards with a manifest that says what is in them and where it came from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import read_json, sha256_file
from common.progress import progress
from data_prep.shards import Shard, ShardSequence
from data_prep.statistics.tally import PartStatistics

MANIFEST = "manifest.json"
STATISTICS = "statistics.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(_Part):
    """How much text: `bytes` of UTF-8, Unicode `characters`, `tokens` with BOS and separators."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0


class Dropped(_Part):
    """How much text was left out of training and out of the held-out part, and where the first of it stood."""

    documents: int = 0
    characters: int = 0
    examples: list[str] = []


class BadRowsReport(_Part):
    """Rows that could not be read and were skipped: how many, and what was wrong with the first of them."""

    rows: int = 0
    examples: list[str] = []


class TrainShard(_Part):
    """One shard of training documents: its prefix in the store's folder, and the source of its set that it is from."""

    name: str
    source: int
    documents: int
    tokens: int


class SourceFile(_Part):
    """One file that a set was read from; `path` is where it lay at the time. `source` is its source's number.

    Of a hub dataset, `path` says name, commit, config and split, and the hash is empty: the commit names the content.
    """

    path: str
    sha256: str
    bytes: int
    source: int = 0


class SetManifest(_Part):
    """One set. `train` is None for a watch set.

    `dropped` is by reason: "empty", "too_short", "too_long", "language", "exact_duplicate", "near_duplicate",
    "near_copy" (of a held-out text), "benchmark" (a copy of one), "over_budget" (the rest of the slice that a budget
    cuts). A budget takes whole slices until it is reached; `slices_beyond_budget` of `slices` it did not come to.
    """

    group: Literal["old", "new", "watch"]
    language: str
    sources: list[SourceFile]
    train: Counts | None
    held_out: Counts
    dropped: dict[str, Dropped]
    bad_rows: BadRowsReport = BadRowsReport()
    shards: list[TrainShard] = []
    slices: int
    slices_beyond_budget: int


class SetStatistics(_Part):
    """Figures of one set. `train` is None for a watch set; `warning` says where the tokenizer hardly knows it."""

    group: Literal["old", "new", "watch"]
    language: str
    train: PartStatistics | None
    held_out: PartStatistics
    dropped: dict[str, Dropped]
    bad_rows: BadRowsReport
    warning: str | None


class StoreStatistics(_Part):
    """`statistics.json`: figures by set."""

    sets: dict[str, SetStatistics]


class StoreManifest(_Part):
    """`files` maps each file's path in the folder to its sha256; `settings` is what `key` was made from."""

    key: str
    tokenizer: str
    tokenizer_key: str
    separator: str
    separator_id: int
    bos_id: int | None
    dtype: Literal["uint16", "int32"]
    settings: dict[str, object]
    sets: dict[str, SetManifest]
    files: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class HeldOutDocument:
    """One held-out document. `tokens` counts the ids that are scored: the text's, without BOS and separator.

    `page` is the value of the field that documents are held out by (translations share it), else "FILE:ROW".
    """

    page: str
    characters: int
    bytes: int
    tokens: int


class TokenStore:
    """Reads a folder that `prepare` has made.

    Raises:
        UserError: no manifest there (preparing was interrupted), or one of another form.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{path}: missing, so these tokens are not complete; run tokenize again")
        try:
            self.manifest = StoreManifest.model_validate(read_json(path))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{path}: not a manifest of this version (at {where}); delete its folder and tokenize"
            ) from error

    @property
    def key(self) -> str:
        """Names the content: equal for equal text, tokenizer and settings, wherever the files lie."""
        return self.manifest.key

    @property
    def sets(self) -> dict[str, SetManifest]:
        """What each set holds, by name, old before new before watch."""
        return self.manifest.sets

    @property
    def statistics(self) -> StoreStatistics:
        """Figures of each set, for users."""
        return StoreStatistics.model_validate(read_json(self.folder / STATISTICS))

    @property
    def separator_id(self) -> int:
        """The id that ends every document."""
        return self.manifest.separator_id

    @property
    def begins_with_bos(self) -> bool:
        """Whether every document begins with the tokenizer's BOS."""
        return self.manifest.bos_id is not None

    def train(self, name: str, source: int | None = None) -> ShardSequence:
        """The training documents of an old or new set, or of one of its sources."""
        entry = self._set(name)
        if entry.train is None:
            raise UserError(f"data.watch.{name}: a watch set is scored, never trained on; name an old or a new set")
        chosen = [shard for shard in entry.shards if source in (None, shard.source)]
        return ShardSequence([self.folder / shard.name for shard in chosen], self.manifest.dtype)

    def held_out(self, name: str) -> Shard:
        """The held-out documents of a set; of a watch set, all of them."""
        self._set(name)
        return Shard(self.folder / name / "held_out")

    def held_out_documents(self, name: str) -> list[HeldOutDocument]:
        """What is known of each document of `held_out(name)`, in the same order."""
        self._set(name)
        path = self.folder / name / "held_out.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [HeldOutDocument(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: can't be read ({error}); delete its folder and run tokenize again") from error

    def verify(self, show: bool = False) -> None:
        """Read every file, check its hash, and every index against its tokens.

        Raises:
            UserError: one is missing or is not what was written; it names the file.
        """
        total = sum(
            (self.folder / name).stat().st_size for name in self.manifest.files if (self.folder / name).is_file()
        )
        with progress(total, "verify", "byte", show=show) as bar:
            for name, sha256 in self.manifest.files.items():
                path = self.folder / name
                if not path.is_file() or sha256_file(path) != sha256:
                    problem = "damaged" if path.is_file() else "missing"
                    raise UserError(f"{path}: {problem}; delete {self.folder} and run tokenize again")
                bar.update(path.stat().st_size)
        for name, entry in self.sets.items():
            parts: list[tuple[Shard | ShardSequence, Counts]] = [(self.held_out(name), entry.held_out)]
            if entry.train is not None:
                parts.append((self.train(name), entry.train))
            for shards, counts in parts:
                if (shards.num_documents, shards.num_tokens) != (counts.documents, counts.tokens):
                    raise UserError(
                        f"{self.folder / name}: its shards hold {shards.num_documents:,} documents and "
                        f"{shards.num_tokens:,} tokens, the manifest says {counts.documents:,} and {counts.tokens:,}; "
                        f"delete {self.folder} and run tokenize again"
                    )

    def _set(self, name: str) -> SetManifest:
        if name not in self.sets:
            raise UserError(f"no set {name!r} in {self.folder}: it holds {', '.join(self.sets)}")
        return self.sets[name]

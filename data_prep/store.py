"""The result of tokenizing: a folder of shards for each set, and the list of a run's sets by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.files import read_json, sha256_file
from common.progress import progress
from data_prep.config import DataConfig
from data_prep.manifest import (
    HELD_OUT,
    OWN_HELD_OUT,
    STATISTICS,
    BadRowsReport,
    Counts,
    Dropped,
    Part,
    SetManifest,
    read_manifest,
)
from data_prep.shards import Shard, ShardSequence
from data_prep.statistics.tally import PartStatistics, fertility_warning


class SetFigures(Part):
    """`statistics.json` of a set's folder. `train` is None for a set that is only scored."""

    train: PartStatistics | None
    held_out: PartStatistics


class SetStatistics(Part):
    """Figures of one of a run's sets; `warning` says where the tokenizer hardly knows its language."""

    group: Literal["old", "new", "watch"]
    language: str
    train: PartStatistics | None
    held_out: PartStatistics
    dropped: dict[str, Dropped]
    bad_rows: BadRowsReport
    warning: str | None


class StoreStatistics(Part):
    """Figures by set."""

    sets: dict[str, SetStatistics]


@dataclass(frozen=True)
class HeldOutDocument:
    """One held-out document. `tokens` counts the ids that are scored: the text's, without BOS and separator.

    `page` is the value of the field that documents are held out by (translations share it), else "FILE:ROW".
    """

    page: str
    characters: int
    bytes: int
    tokens: int


class TokenSet:
    """Reads the folder of one set.

    Raises:
        UserError: no manifest there (preparing was interrupted), or one of another form.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, SetManifest)

    @property
    def statistics(self) -> SetFigures:
        """Its figures, for users."""
        return SetFigures.model_validate(read_json(self.folder / STATISTICS))

    def train(self, source: int | None = None) -> ShardSequence:
        """The training documents, or those of one source; none of a set that is only scored."""
        chosen = [shard for shard in self.manifest.shards if source in (None, shard.source)]
        return ShardSequence([self.folder / shard.name for shard in chosen], self.manifest.dtype)

    def held_out(self, *, by_own_tokenizer: bool = False) -> Shard:
        """The held-out documents; of a set that is only scored, all of them.

        Args:
            by_own_tokenizer: by the model's own tokenizer, where the run's extends it.
        """
        is_extended = self.manifest.own_tokenizer_key is not None
        return Shard(self.folder / (OWN_HELD_OUT if by_own_tokenizer and is_extended else HELD_OUT))

    def held_out_documents(self) -> list[HeldOutDocument]:
        """What is known of each document of `held_out()`, in the same order."""
        path = self.folder / f"{HELD_OUT}.jsonl"
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
        paths = {self.folder / name: sha256 for name, sha256 in self.manifest.files.items()}
        total = sum(path.stat().st_size for path in paths if path.is_file())
        with progress(total, f"verify {self.folder.name}", "byte", show=show) as bar:
            for path, sha256 in paths.items():
                if not path.is_file() or sha256_file(path) != sha256:
                    problem = "damaged" if path.is_file() else "missing"
                    raise UserError(f"{path}: {problem}; delete {self.folder} and run tokenize again")
                bar.update(path.stat().st_size)
        parts: list[tuple[Shard | ShardSequence, Counts]] = [(self.held_out(), self.manifest.held_out)]
        if self.manifest.train is not None:
            parts.append((self.train(), self.manifest.train))
        for shards, counts in parts:
            if (shards.num_documents, shards.num_tokens) != (counts.documents, counts.tokens):
                raise UserError(
                    f"{self.folder}: its shards hold {shards.num_documents:,} documents and "
                    f"{shards.num_tokens:,} tokens, the manifest says {counts.documents:,} and {counts.tokens:,}; "
                    f"delete {self.folder} and run tokenize again"
                )


class TokenStore:
    """The sets of a run by their names, old before new before watch.

    Args:
        tokens_folder: where the sets lie, each in the folder of its key.
        data: the run's names, groups and languages of sets.
        keys: the key of each set, by name.

    Raises:
        UserError: a set is missing, or its folder is not complete.
    """

    def __init__(self, tokens_folder: Path, data: DataConfig, keys: Mapping[str, str]) -> None:
        self.folder, self.data = Path(tokens_folder), data
        missing = [name for name in data.sets if name not in keys]
        if missing:
            raise UserError(f"data.{data.group(missing[0])}.{missing[0]}: not prepared yet; run tokenize again")
        self.keys = {name: keys[name] for name in data.sets}
        self.sets = {name: TokenSet(self.folder / key) for name, key in self.keys.items()}

    @property
    def statistics(self) -> StoreStatistics:
        """Figures of each set, for users."""
        return StoreStatistics(sets={name: self._statistics(name, one) for name, one in self.sets.items()})

    @property
    def separator_id(self) -> int:
        """The id that ends every document."""
        return self.any_manifest.separator_id

    @property
    def begins_with_bos(self) -> bool:
        """Whether every document begins with the tokenizer's BOS."""
        return self.any_manifest.bos_id is not None

    @property
    def tokenizer_key(self) -> str:
        """Changes with anything that changes a document's ids."""
        return self.any_manifest.tokenizer_key

    @property
    def own_tokenizer_key(self) -> str | None:
        """The same of the model's own tokenizer, where the run's extends it; else None."""
        return self.any_manifest.own_tokenizer_key

    @property
    def any_manifest(self) -> SetManifest:
        """The manifest of one of the sets: all have the same tokenizer."""
        return next(iter(self.sets.values())).manifest

    def train(self, name: str, source: int | None = None) -> ShardSequence:
        """The training documents of an old or new set, or of one of its sources."""
        one = self._set(name)
        if name in self.data.watch:
            raise UserError(f"data.watch.{name}: a watch set is scored, never trained on; name an old or a new set")
        return one.train(source)

    def held_out(self, name: str, *, by_own_tokenizer: bool = False) -> Shard:
        """The held-out documents of a set; of a watch set, all of them.

        Args:
            name: of the set.
            by_own_tokenizer: by the model's own tokenizer, where the run's extends it.
        """
        return self._set(name).held_out(by_own_tokenizer=by_own_tokenizer)

    def held_out_documents(self, name: str) -> list[HeldOutDocument]:
        """What is known of each document of `held_out(name)`, in the same order."""
        return self._set(name).held_out_documents()

    def verify(self, show: bool = False) -> None:
        """Check every set's files.

        Raises:
            UserError: one is missing or is not what was written; it names the file.
        """
        for one in self.sets.values():
            one.verify(show)

    def _statistics(self, name: str, one: TokenSet) -> SetStatistics:
        figures, language = one.statistics, self.data.sets[name].language
        trained = {entry.language for entry in (*self.data.old.values(), *self.data.new.values())}
        is_said = self.data.group(name) == "watch" and language in trained  # of the set that is trained on
        return SetStatistics(
            group=self.data.group(name),
            language=language,
            train=figures.train,
            held_out=figures.held_out,
            dropped=one.manifest.dropped,
            bad_rows=one.manifest.bad_rows,
            warning=None if is_said else fertility_warning(name, language, figures.train or figures.held_out),
        )

    def _set(self, name: str) -> TokenSet:
        if name not in self.sets:
            raise UserError(f"no set {name!r} in this run: it has {', '.join(self.sets)}")
        return self.sets[name]

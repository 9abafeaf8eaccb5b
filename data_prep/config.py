"""The keys of a run's YAML that concern its text: which it is, what is done to it, and how it is mixed."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from common.section import Fraction, Positive, Section


class CapsConfig(Section):
    """The most that is taken, whichever is reached first: whole documents, never more."""

    max_documents: Positive | None = None
    max_tokens: Positive | None = None
    max_characters: Positive | None = None

    @property
    def caps(self) -> tuple[int | None, int | None, int | None]:
        """Documents, tokens, characters."""
        return self.max_documents, self.max_tokens, self.max_characters


class PlaceConfig(CapsConfig):
    """Where text lies: ``path`` is a file, a folder or a glob; ``hub`` is a Hugging Face dataset, read as a stream.

    ``hub`` takes ``config``, ``split``, ``revision`` (a commit, so that the text stays the same) and ``data_files``
    (those of the split that are read; without it, all). ``text_field`` is the field or column with the text. A
    ``.txt`` file is one document, or one per line with ``text_unit: line``. ``license`` is named in the model card; a
    hub dataset's own is, once it is fetched, where none is given.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: list[str] | None = None
    text_field: str = "text"
    text_unit: Literal["file", "line"] = "file"
    license: str | None = None


class SourceConfig(PlaceConfig):
    """One source. ``weight`` is its share of its set's samples; without it, sources share by their tokens."""

    weight: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError("name exactly one of path and hub, as {path: el.jsonl} or {hub: owner/name}")
        if self.path is not None and any(x is not None for x in (self.config, self.revision, self.data_files)):
            raise ValueError("config, revision and data_files are of a hub dataset; give hub instead of path")
        return self


class SetConfig(PlaceConfig):
    """One named set of text: one place, given here, or a list of ``sources``.

    ``language`` is the set's name unless given; ``language_label`` is what a language identifier calls it, where that
    differs. ``weight`` is the set's share of a stage's tokens. The caps are the set's own, over all its sources.
    ``held_out_fraction`` is in the place of ``held_out.fraction`` for this set, such as a small one.
    """

    sources: list[SourceConfig] = []
    language: str = ""
    language_label: str = ""
    weight: float = Field(default=1.0, gt=0)
    held_out_fraction: Fraction | None = None

    @model_validator(mode="after")
    def _check(self) -> "SetConfig":
        given = [self.path is not None, self.hub is not None, bool(self.sources)]
        if sum(given) != 1:
            raise ValueError("path: give exactly one of path, hub and sources, as {path: el.jsonl}")
        _ = self.source_list
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("sources: some have a weight and some have none; give it to all of them, or to none")
        return self

    def held_out_share(self, fraction: float) -> float:
        """The share of its pages that is held out: its own, or the ``fraction`` of all sets."""
        return self.held_out_fraction or fraction

    @property
    def source_list(self) -> list[SourceConfig]:
        """The sources, also where the set is its only one."""
        place = set(PlaceConfig.model_fields) - set(CapsConfig.model_fields)  # the caps are the set's own
        return self.sources or [SourceConfig(**self.model_dump(include=place))]


class HeldOutConfig(Section):
    """Which documents are held out of training: ``fraction`` of them, by a hash of the field ``by``.

    Documents that share the field's value (a page and its translations) fall on the same side;
    ``by: document`` uses the text itself. The fraction is lowered where it would hold out more than ``max_megabytes``
    of the run's files. A set may have its own (``held_out_fraction``), which is not lowered; where it is larger,
    translations of its held-out pages are trained on in other sets. Training documents that contain or nearly copy a
    held-out or benchmark text are dropped: that is, hold ``near_copy_threshold`` of its word triples (null: none is).
    """

    by: str = "document"
    fraction: Fraction = 0.01
    max_megabytes: Positive = 64
    near_copy_threshold: float | None = Field(default=0.8, gt=0, le=1)


class LanguageFilterConfig(Section):
    """Drops a document unless ``identifier`` says its set's language with at least this probability.

    ``identifier`` is py3langid (offline, 97 languages) or the path of a fastText model such as GlotLID's model.bin.
    """

    identifier: str = "py3langid"
    threshold: float = Field(default=0.5, gt=0, le=1)


class NearDuplicatesConfig(Section):
    """MinHash bands: two documents are joined where all ``rows`` values of one of ``bands`` bands agree.

    That happens with probability 1 - (1 - J^rows)^bands at Jaccard similarity J of their runs of ``shingle`` words:
    at the defaults (FineWeb's) 0.92 at J = 0.8, 0.56 at 0.7, 0.05 at 0.5.
    """

    bands: Positive = 14
    rows: Positive = 8
    shingle: Positive = 5


class FiltersConfig(Section):
    """What is done to documents and which are dropped; all are off unless given. A watch set is never filtered.

    ``normalize`` is a Unicode normal form; ``fix_text`` repairs mojibake with ftfy; lengths are in characters.
    Duplicates are found across all sets; of each group of copies the first in the order of sets stays.
    """

    normalize: Literal["NFC", "NFKC"] | None = None
    fix_text: bool = False
    min_characters: Positive | None = None
    max_characters: Positive | None = None
    language: LanguageFilterConfig | None = None
    exact_duplicates: bool = False
    near_duplicates: NearDuplicatesConfig | None = None

    @property
    def duplicates(self) -> bool:
        """Whether duplicates are looked for at all."""
        return self.exact_duplicates or self.near_duplicates is not None


class ReplayConfig(Section):
    """The most that old sets give to training, together: a share of stage 1's tokens, or tokens, or characters.

    It is split by the sets' weights and drawn over the whole of each corpus, by the run's seed.
    """

    share: float | None = Field(default=None, gt=0)
    tokens: Positive | None = None
    characters: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> "ReplayConfig":
        if sum(value is not None for value in (self.share, self.tokens, self.characters)) != 1:
            raise ValueError("give exactly one of share, tokens and characters, as {share: 0.009}; or null for all")
        return self


class DataConfig(Section):
    """The sets: ``old`` languages are kept, ``new`` ones learned, ``watch`` only scored.

    ``benchmarks`` are texts that no training document may contain or copy. ``bad_rows`` says whether a row that can't
    be read stops the job or is counted and skipped. A task of preparation reads about ``slice_bytes`` of text.
    ``tokenizer`` is a folder, a hub id or a SentencePiece file. ``separator`` is the token that ends a document, which
    begins with the BOS that the tokenizer by itself puts in front of a text; with ``bos: none`` it does not. With
    ``temperature`` T a set's share of samples is weight x tokens^(1/T) instead of weight alone. ``isolate_documents``
    resets attention and positions at each document of a packed sample. ``seed`` chooses what is held out, what caps
    take and what is replayed, by default the run's seed: runs of several seeds share their text if it is given.
    """

    old: dict[str, SetConfig] = {}
    new: dict[str, SetConfig]
    watch: dict[str, SetConfig] = {}
    benchmarks: dict[str, SourceConfig] = {}
    held_out: HeldOutConfig = HeldOutConfig()
    filters: FiltersConfig = FiltersConfig()
    replay: ReplayConfig | None = ReplayConfig(share=0.009)
    bad_rows: Literal["stop", "skip"] = "stop"
    max_document_bytes: Positive = 16 << 20
    slice_bytes: Positive = 64 << 20
    tokenizer: str | None = None
    separator: str = "auto"
    bos: Literal["auto", "none"] = "auto"
    temperature: float | None = Field(default=None, gt=0)
    isolate_documents: bool = False
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _names_are_languages(cls, value: Any) -> Any:
        """A set's language is its name unless it says otherwise; a set given as null is left out."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for group in ("old", "new", "watch"):
            sets = value.get(group)
            if sets is None:
                value.pop(group, None)
            elif isinstance(sets, dict):
                value[group] = {
                    str(name): {**entry, "language": entry.get("language") or str(name)}
                    if isinstance(entry, dict)
                    else entry
                    for name, entry in sets.items()
                    if entry is not None
                }
        return value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.new:
            raise ValueError("new: no set; name at least one language to learn, as new: {el: {path: el.jsonl}}")
        groups = {"old": self.old, "new": self.new, "watch": self.watch}
        names: dict[str, str] = {}
        for group, sets in groups.items():
            for name in sets:
                if name in names:
                    raise ValueError(f"{group}.{name}: the name is used in {names[name]} too; rename one of the sets")
                if "/" in name or name.startswith("."):
                    raise ValueError(f"{group}.{name}: a set's name becomes a folder; use letters, digits, - and _")
                names[name] = group
        for name, entry in self.watch.items():
            caps = [*entry.caps[1:], *(cap for source in entry.sources for cap in source.caps)]
            if any(cap is not None for cap in caps):
                raise ValueError(f"watch.{name}: of a watch set, only max_documents of the whole set can be given")
            if entry.held_out_fraction is not None:
                raise ValueError(f"watch.{name}.held_out_fraction: a watch set is held out whole; leave it out")
        for name, source in self.benchmarks.items():
            if any(cap is not None for cap in source.caps):
                raise ValueError(f"benchmarks.{name}: budgets are for training text; a benchmark is compared whole")
            if source.weight is not None:
                raise ValueError(f"benchmarks.{name}.weight: a benchmark is not trained on; leave its weight out")
        both = {s.language for s in self.old.values()} & {s.language for s in self.new.values()}
        if both:
            raise ValueError(f"language {sorted(both)[0]!r} is both old and new; keep it in one of the two")
        return self

    @property
    def sets(self) -> dict[str, SetConfig]:
        """All sets by name, old before new before watch."""
        return {**self.old, **self.new, **self.watch}

    def group(self, name: str) -> Literal["old", "new", "watch"]:
        """Which group the set of this name is in."""
        return "old" if name in self.old else "new" if name in self.new else "watch"


class ModelConfig(Section):
    """The dense model: a folder, or a hub id with a revision.

    ``tokenizer`` is a folder with the model's tokenizer to which tokens were added, after all of its ids. Their
    embedding and head rows start as the mean of their pieces' rows, and train in stage 1.
    """

    path: str
    revision: str | None = None
    tokenizer: str | None = None


class Stage1Tokens(Section):
    """How many ``tokens`` stage 1 trains on, which ``data.replay.share`` is a share of; None sets no limit."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    tokens: Positive | None = None


class PreparationConfig(Section):
    """The keys of a run's YAML that preparing its text depends on; the others are ignored here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: ModelConfig
    data: DataConfig
    seed: int = Field(default=17, ge=0)
    cache_dir: Path = Path("cache")
    stage1: Stage1Tokens | None = None

    @property
    def stage1_tokens(self) -> int | None:
        """How many tokens stage 1 trains on; None where it is not known, or there is none."""
        return None if self.stage1 is None else self.stage1.tokens

    @property
    def text_seed(self) -> int:
        """What chooses text: ``data.seed``, or the run's seed where it is not given."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """The tokenizer's path or hub id, and its revision: the model's, unless one is named."""
        named = self.data.tokenizer or self.model.tokenizer
        return (self.model.path, self.model.revision) if named is None else (named, None)

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "PreparationConfig":
        check_one_tokenizer(self.model, self.data)
        return self


def check_one_tokenizer(model: ModelConfig, data: DataConfig) -> None:
    """Refuse two tokenizers in one run."""
    if model.tokenizer is not None and data.tokenizer is not None:
        raise ValueError(
            "model.tokenizer, an extension of the model's own, and data.tokenizer, which replaces it, are both given; "
            "leave one of them out"
        )

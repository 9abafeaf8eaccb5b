"""A run's YAML for a user's own model and text, with values that fit both."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.errors import UserError
from common.files import write_text
from common.settings import parse_settings
from common.yaml_reader import parse_yaml
from data_prep.config import ModelConfig, PreparationConfig, SetConfig
from data_prep.make_plan import Planned
from data_prep.prepare import plan_preparation
from data_prep.reading.bad_row import BadRow
from data_prep.reading.file_splits import FileSplit, arrow_batches
from data_prep.reading.rows import read_rows
from data_prep.reading.sources import format_of, source_files
from data_prep.sample import sample_documents
from data_prep.slices_to_read import size_of
from pipeline.config.run import RunConfig

CACHE = Path("cache")  # where the run will look for the hashes of its files too
SAMPLE_TOKENS = 100_000  # of a set; what is true of them is taken to be true of the rest
SAMPLE_ROWS, SAMPLE_BYTES = 20, 1 << 20  # in which the field of the text is looked for
LONGEST = 1024  # tokens of a sample, as in the papers
SMALL = 100_000_000  # tokens of stage 1: below this, the papers' batches would make few steps
STEPS = 300  # that stage 1 of a small run should have, or more
FEW_HELD_OUT = 50  # documents of a set


@dataclass(frozen=True)
class FoundSet:
    """What was found of a set's text.

    Attributes:
        name: the set's.
        place: its entry in the YAML.
        documents: about how many there are.
        tokens: about how many.
    """

    name: str
    place: str
    documents: int
    tokens: int

    @property
    def figures(self) -> str:
        """Its size, for people."""
        return f"about {self.documents:,} documents, {_short(self.tokens)} tokens"


def write_new_run(path: Path, model: str, old: list[str], new: list[str]) -> None:
    """Look at a model and at texts, and write a run for them.

    Args:
        path: of the YAML; its name becomes the run's.
        model: a folder or a hub id.
        old: texts of languages that the model knows, each as NAME=PATH.
        new: texts of languages to teach it.

    Raises:
        UserError: the file exists, or the model or a text can't be used.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; name another file, or delete it")
    text = _new_run(path, model, old, new)
    parse_settings(RunConfig, parse_yaml(text, str(path)), str(path))
    write_text(path, text)
    print(f"{path}: written; look at it, then: python -m pipeline run {path}", flush=True)


def _new_run(path: Path, model: str, old: list[str], new: list[str]) -> str:
    from pipeline.model.model_folder import model_config, model_folder

    config = model_config(model_folder(ModelConfig(path=model))).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    places = {group: dict(map(_place, entries)) for group, entries in (("old", old), ("new", new))}
    tree = {"model": {"path": model}, "data": places, "cache_dir": str(CACHE)}
    planned = plan_preparation(parse_settings(PreparationConfig, tree, "new"))
    found = {group: [_found(planned, name) for name in sets] for group, sets in places.items()}
    for one in [*found["old"], *found["new"]]:
        print(f"{one.name}: {one.figures}", flush=True)
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True)  # noqa: S701 - YAML
    values = _values(found["old"], found["new"], config.num_hidden_layers, positions)
    names = {"path": path, "name": path.stem, "model": model}
    return environment.get_template("new_run.yaml.jinja").render(**names, **found, **values) + "\n"


def _place(entry: str) -> tuple[str, dict[str, str]]:
    """A set's name, and where its text lies: the path, and the field with the text if it is not ``text``."""
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise UserError(f"{entry}: not of the form NAME=PATH, such as tr=text/tr.jsonl")
    files = source_files(SetConfig(path=path).source_list[0])
    place = {"path": path, "text_field": _text_field(files[0])}
    if len(files) == 1 and format_of(files[0]) == "text":
        place["text_unit"] = "line"  # a single document can't be divided
    return name, {key: value for key, value in place.items() if (key, value) != ("text_field", "text")}


def _text_field(file: Path) -> str:
    """``text``, or else the field that holds most text in the first rows."""
    sizes: dict[str, int] = {}
    for row in itertools.islice(_rows(file), SAMPLE_ROWS):
        for key, value in row.items():
            if isinstance(value, str):
                sizes[key] = sizes.get(key, 0) + len(value)
    if not sizes:
        raise UserError(f"{file}: its first rows hold no field with text; name another path")
    return "text" if "text" in sizes else max(sizes, key=lambda key: sizes[key])


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, with all of their fields."""
    kind = format_of(file)
    assert kind is not None
    if kind == "parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(SAMPLE_ROWS):
            yield from batch.to_pylist()
    elif kind == "arrow":
        for batch in arrow_batches(file):
            yield from batch.slice(0, SAMPLE_ROWS).to_pylist()
    else:
        split = FileSplit(str(file), kind, 0, file.stat().st_size, 1, 0)
        for _, row in read_rows(split, ["text"], "text", SAMPLE_BYTES):
            if not isinstance(row, BadRow):
                yield row


def _found(planned: Planned, name: str) -> FoundSet:
    one = next(found for found in planned.sets if found.name == name)
    sample = sample_documents(planned, name, SAMPLE_TOKENS)
    if not sample:
        raise UserError(f"{one.where}: no document with text; name another path")
    tokens, read = sum(len(document.ids) for document in sample), sum(len(d.text.encode()) for d in sample)
    size = size_of(planned.corpora[name])
    scale = max(1.0, size / read) if tokens >= SAMPLE_TOKENS else 1.0
    given = one.entry.model_dump(include={"path", "text_field", "text_unit"}, exclude_defaults=True)
    place = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
    return FoundSet(name, f"{{{place}}}", round(len(sample) * scale), round(tokens * scale))


def _values(old: list[FoundSet], new: list[FoundSet], layers: int, positions: int) -> dict[str, Any]:
    """What the template leaves open."""
    from pipeline.distributed.device import num_gpus  # imports torch

    smallest = min(one.tokens for one in (*old, *new))
    fraction = min(0.1, max(0.001, FEW_HELD_OUT / min(one.documents for one in (*old, *new))))
    trained = 0.95 * (1 - fraction)  # of the text: some of the rest are copies of what is held out
    num_new_tokens = int(sum(one.tokens for one in new) * trained)
    num_old_tokens = int(sum(one.tokens for one in old) * trained)
    passes = 1 if num_new_tokens >= SMALL else min(4, max(1, round(SMALL / num_new_tokens)))
    longest = min(LONGEST, positions, max(8, smallest // 16))
    sequence_length = _power_of_two(min(longest, max(128, passes * num_new_tokens // (8 * STEPS))))
    stage1 = _stage(num_new_tokens * passes, sequence_length, STEPS)
    stage1["note"] = f"{passes} x the new text"
    # The papers review 0.9 % of stage 1's tokens; where that is little, a third of the steps, of the old text at most.
    wanted = 0.009 * stage1["tokens"] if stage1["tokens"] >= SMALL else stage1["tokens"] / 6
    reviewed = int(min(wanted, num_old_tokens))
    stage2 = _stage(2 * reviewed, sequence_length, STEPS // 3)
    stage2["lr"] = "3.0e-3" if stage1["tokens"] < SMALL else stage1["lr"]
    stage2["note"] = f"half of it old: {_short(stage2['tokens'] / 2)}"
    share = stage2["tokens"] / 2 / stage1["tokens"]
    gpus = num_gpus()
    return {
        "layers": layers,
        "positions": positions,
        "held_out_by": "document",
        "fraction": f"{fraction:.2g}",
        "replay": "null" if num_old_tokens < 1.2 * share * stage1["tokens"] else f"{{share: {share:.3g}}}",
        "similarity_tokens": min(100_000 if gpus else 20_000, smallest // 2),
        "classifiers": max(1, round(layers * 7 / 24)),  # 7 of the 24 layers of Qwen1.5-1.8B (LayerMoE)
        "sequence_length": sequence_length,
        "stage1": stage1,
        "stage2": stage2,
        "validate_every": max(1, stage1["tokens"] // 5),
        "ranks": gpus or 1,
        "deepspeed": f"ds_configs/{'bf16' if gpus else 'fp32'}_zero1.json",
    }


def _stage(tokens: int, sequence_length: int, steps: int) -> dict[str, Any]:
    """A stage's batch of 8 to 512 samples, so that there are ``steps`` of them or more; and its tokens."""
    batch = min(512, max(8, _power_of_two(tokens // (sequence_length * steps))))
    whole = max(1, tokens // (batch * sequence_length)) * batch * sequence_length
    return {"batch": batch, "tokens": whole, "lr": "5.0e-5" if batch >= 256 else "5.0e-4" if batch <= 32 else "2.0e-4"}


def _power_of_two(most: int) -> int:
    return 1 << max(0, math.floor(math.log2(max(1, most))))


def _short(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"

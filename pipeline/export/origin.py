"""What an exported folder tells of the run that it came from, so that it can be expanded further."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.tensors import file_entry
from pipeline.method.upcycle import TOKENIZER_FILES, copy_files
from pipeline.records.expansion import EXPANSION_FILE, OWN_TOKENIZER, Expansion


@dataclass(frozen=True)
class Origin:
    """What an import needs to know besides the weights.

    Attributes:
        expansion: of the run; its files are added when they are written.
        own_tokenizer: a folder with the dense model's own tokenizer, where the run's extends it; else None.
    """

    expansion: Expansion
    own_tokenizer: Path | None


def write_origin(origin: Origin, folder: Path) -> None:
    """Write it beside the weights, whose hashes it holds."""
    if origin.own_tokenizer is not None:
        (folder / OWN_TOKENIZER).mkdir()
        copy_files(origin.own_tokenizer, TOKENIZER_FILES, folder / OWN_TOKENIZER)
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    files = {path.name: file_entry(path) for path in weights}
    origin.expansion.model_copy(update={"files": files}).save(folder / EXPANSION_FILE)

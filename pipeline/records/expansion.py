"""What an exported folder says of the expansions that made it, and what an imported one is."""

from typing import Any

from pipeline.records.checkpoint import Manifest, UpcycledManifest
from pipeline.records.record import Record

EXPANSION_FILE = "expansion.json"  # in an exported folder
OWN_TOKENIZER = "own_tokenizer"  # there, the dense model's own tokenizer, where the folder's extends it
IMPORTED_FILE = "imported.json"  # in an imported folder
MODEL_FOLDER = "model"  # there, the dense model's config and own tokenizer


class Expansion(Manifest):
    """``expansion.json``: what a further expansion needs besides the weights, whose files the manifest names.

    Attributes:
        run: the name of the run.
        checkpoint: which of its checkpoints: stage2, stage1/best …
        form: that the weights are written in.
        config: the dense model's config.json.
        upcycled: of the untrained mixture, with the plan that says each expert's ancestry, without its files.
        has_classifiers: whether the routing classifiers have been trained.
        selection_biases: whether routers have a selection bias.
        training_dtype: what the run trained in.
        written_dtype: of the folder's weights.
    """

    run: str
    checkpoint: str
    form: str
    config: dict[str, Any]
    upcycled: UpcycledManifest
    has_classifiers: bool
    selection_biases: bool
    training_dtype: str
    written_dtype: str

    @property
    def holds_all(self) -> bool:
        """Whether the folder's weights are those of the run to the last bit."""
        return self.written_dtype == "float32" or self.written_dtype == self.training_dtype == self.upcycled.dtype


class Imported(Record):
    """``imported.json``: the base of further expansions that came from an exported folder.

    Attributes:
        run, checkpoint: where its weights were trained.
        has_classifiers: whether its routing classifiers have been trained.
        extends_tokenizer: whether its tokenizer extends the dense model's.
    """

    run: str
    checkpoint: str
    has_classifiers: bool
    extends_tokenizer: bool

"""A tiny run whose tokenizer extends its model's own, by the product's own command."""

from pathlib import Path
from typing import Any

from data_prep.extend.extend import extend_tokenizer
from tests.helpers.tiny import VOCAB_SIZE, parse_run, prepared_run, run_tree, save_model

ADDED = 40
FIRST = VOCAB_SIZE  # the tiny tokenizer has an id for each row


def extended_tree(
    folder: Path, family: str = "llama", *, vocab_size: int = VOCAB_SIZE, **changes: Any
) -> dict[str, Any]:
    """The settings of such a run; the model and the tokenizer are made unless they are there.

    Args:
        folder: of all of its files.
        family: of the model.
        vocab_size: rows of the model; more than the tokenizer has ids are as many models' padding.
        changes: to the settings, as of :func:`tests.helpers.tiny.run_tree`.
    """
    if not (folder / "model").is_dir():
        tied = family.startswith("gemma") or family == "qwen2"
        save_model(folder / "model", family, vocab_size=vocab_size, tie_word_embeddings=tied)
    target = folder / "tokenizer"
    if not target.is_dir():
        extend_tokenizer(parse_run(run_tree(folder, **changes), "x").preparation, ADDED, target)
    return run_tree(folder, **changes, model={"tokenizer": str(target)})


def prepared_extended_run(folder: Path, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The settings of such a run that is done up to upcycling; its new experts are copies of their MLPs."""
    tree = extended_tree(folder, family, **changes)
    prepared_run(folder, distinct_experts=False, **changes, model=tree["model"])
    return tree

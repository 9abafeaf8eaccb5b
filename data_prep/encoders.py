"""The tokenizer that a run's text is encoded by; where it extends the model's own, that one too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError, one_line
from data_prep.config import PreparationConfig
from data_prep.extension import KEY, NewTokens, find_new_tokens
from data_prep.tokenizer import DocumentEncoder, dtype_of, load_tokenizer


@dataclass(frozen=True)
class Encoders:
    """What makes ids of a run's text.

    Attributes:
        encoder: the run's tokenizer.
        dtype: that holds its ids.
        own: the model's own tokenizer, where the run's extends it; else None.
        new_tokens: what the run's adds to it; else None.
    """

    encoder: DocumentEncoder
    dtype: Literal["uint16", "int32"]
    own: DocumentEncoder | None = None
    new_tokens: NewTokens | None = None


def make_encoders(config: PreparationConfig) -> Encoders:
    """The run's tokenizer.

    Raises:
        UserError: there is no such tokenizer, it does not extend the model's, or the model has no embedding for its
            ids.
    """
    (path, revision), data, vocab_size = config.tokenizer, config.data, _vocab_size(config)
    begins_with_bos = data.bos == "auto"
    new_tokens = find_extension(config, vocab_size)
    if new_tokens is None:
        encoder = DocumentEncoder.create(path, data.separator, vocab_size, revision, begins_with_bos=begins_with_bos)
        return Encoders(encoder, dtype_of(vocab_size))
    model, size = config.model, new_tokens.vocabulary(vocab_size)
    own = DocumentEncoder.create(
        model.path, data.separator, vocab_size, model.revision, begins_with_bos=begins_with_bos
    )
    encoder = DocumentEncoder.create(path, own.spec.separator, size, begins_with_bos=begins_with_bos)
    if encoder.spec.bos_id != own.spec.bos_id:
        raise UserError(
            f"{KEY}: {path}: begins a text with the id {encoder.spec.bos_id}, the model's tokenizer with "
            f"{own.spec.bos_id}; copy the model's tokenizer_config.json and post_processor"
        )
    return Encoders(encoder, dtype_of(size), own, new_tokens)


def find_extension(config: PreparationConfig, vocab_size: int | None = None) -> NewTokens | None:
    """What ``model.tokenizer`` adds to the model's own tokenizer; None where it is not given or adds nothing.

    Args:
        config: what the run says of its text.
        vocab_size: rows of the model, where they are known.

    Raises:
        UserError: it is not the model's tokenizer with more tokens after it.
    """
    model = config.model
    if model.tokenizer is None:
        return None
    if not Path(model.tokenizer).is_dir():
        raise UserError(f"{KEY}: {model.tokenizer} is not a folder; name one with a tokenizer.json")
    own, extended = (
        load_tokenizer(model.path, model.revision, "model.path"),
        load_tokenizer(model.tokenizer, None, KEY),
    )
    return find_new_tokens(own, extended, vocab_size or _vocab_size(config), model.tokenizer)


def _vocab_size(config: PreparationConfig) -> int:
    """The vocabulary of the run's model, from its configuration."""
    from transformers import AutoConfig

    path = config.model.path
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"model.path: {path} is not a folder; name one with a model, or a hub id")
    try:
        found = AutoConfig.from_pretrained(path, revision=config.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: no model configuration at {path} ({one_line(error)}); name a folder, or a hub id, which "
            "python -m pipeline fetch RUN.yaml downloads"
        ) from error
    return int(found.get_text_config().vocab_size)

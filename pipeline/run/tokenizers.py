"""The tokenizer of a model's text, and what a document begins with."""

from typing import TYPE_CHECKING, Any

from data_prep.tokenizer import load_tokenizer
from pipeline.records.checkpoint import HF_FOLDER
from pipeline.run.context import RunContext

if TYPE_CHECKING:
    from pipeline.evaluation.begins import Begins
    from pipeline.evaluation.checkpoints import Scored


def tokenizer_of(context: RunContext, scored: "Scored") -> Any:
    """The one of a model's text: the run's own choice, the dense model's, or the run's that extends it.

    Raises:
        UserError: transformers can't load it.
    """
    from transformers import AutoTokenizer

    named = context.run.data.tokenizer
    if named is not None:
        return load_tokenizer(named, None)
    is_dense = scored.by_own_tokenizer or context.run.method.is_dense
    return AutoTokenizer.from_pretrained(context.dense if is_dense else context.upcycled / HF_FOLDER)


def beginning_of(context: RunContext, tokenizer: Any) -> int:
    """What a document begins with, in training as in scoring: BOS, or without one the separator."""
    return int(tokenizer.bos_token_id) if context.store.begins_with_bos else context.store.separator_id


def begins_of(context: RunContext, scored: "Scored") -> "Begins":
    """A model's tokenizer, and what its documents begin and end with; text that spells a special token stays text."""
    from pipeline.evaluation.begins import Begins

    tokenizer = tokenizer_of(context, scored)
    tokenizer.split_special_tokens = True  # as in training
    return Begins(tokenizer, beginning_of(context, tokenizer), context.store.separator_id)

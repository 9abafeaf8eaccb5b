"""Where rows of new tokens start: at the mean of their pieces' rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.extension import NewTokens
from pipeline.model.new_rows import install_new_rows
from pipeline.records.checkpoint import NewRows


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer that extends the model's own.

    Attributes:
        folder: where its files lie.
        key: of its content.
        new_tokens: what it adds.
    """

    folder: Path
    key: str
    new_tokens: NewTokens

    @property
    def rows(self) -> NewRows:
        """The rows that a model gets for it."""
        return NewRows(first=self.new_tokens.first, count=self.new_tokens.count, tokenizer=self.key)


@torch.no_grad()
def add_new_rows(model: PreTrainedModel, tokenizer: ExtendedTokenizer) -> int:
    """Give a dense model rows for new tokens, each the mean of the rows of its pieces by the model's own tokenizer.

    Args:
        model: with its weights; changed in place.
        tokenizer: the extended one.

    Returns:
        The number of their parameters.
    """
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    parameters = install_new_rows(model, tokenizer.rows)
    for parameter, weight in zip(parameters, weights, strict=False):  # a tied head has no rows of its own
        parameter.copy_(mean_rows(weight, tokenizer.new_tokens.pieces))
    return sum(parameter.numel() for parameter in parameters)


def mean_rows(weight_VD: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """For each list of ids the mean of their rows, computed in fp32: [lists, D].

    Args:
        weight_VD: the rows.
        pieces: lists of ids, none of them empty.
    """
    return torch.stack([weight_VD[list(ids)].float().mean(0) for ids in pieces])

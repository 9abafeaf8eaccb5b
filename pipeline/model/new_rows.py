"""Rows for new tokens: an embedding and a head whose old rows are the dense model's, and whose new rows train alone.

The old rows stay the parameter that they were, under its name; new rows are a parameter of their own. So everything
that divides, saves or freezes parameters treats them as any other. A tied head has the embedding's new rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from pipeline.records.checkpoint import NewRows


class Extended(nn.Module):
    """What an embedding and a head with rows for new tokens have in common.

    Args:
        original: the dense model's.
        new_rows: [number of new tokens, D].
        rows: which ids they are of, and whether they may train; what the original has for these ids is not used.
    """

    def __init__(self, original: nn.Embedding | nn.Linear, new_rows: nn.Parameter, rows: NewRows) -> None:
        super().__init__()
        self.weight: Tensor = original.weight
        self.new_rows, self.first, self.may_train = new_rows, rows.first, rows.train

    @property
    def num_rows(self) -> int:
        """V, new rows included."""
        return max(len(self.weight), self.first + len(self.new_rows))

    def parts(self) -> list[Tensor]:
        """The rows in the order of their ids: old, new, and the dense model's for ids that no token has, if any."""
        rest = self.weight[self.first + len(self.new_rows) :]
        return [self.weight[: self.first], self.new_rows, *([rest] if len(rest) else [])]


class ExtendedEmbedding(Extended):
    """An embedding with rows for new tokens."""

    def __init__(self, original: nn.Embedding, new_rows: nn.Parameter, rows: NewRows) -> None:
        super().__init__(original, new_rows, rows)
        scale = getattr(original, "embed_scale", None)  # Gemma multiplies the rows that it looks up
        self.embed_scale: Tensor | None
        self.register_buffer("embed_scale", None if scale is None else torch.as_tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Shape [...] to [..., D]."""
        is_new = (ids >= self.first) & (ids < self.first + len(self.new_rows))
        old = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        new = F.embedding((ids - self.first).masked_fill(~is_new, 0), self.new_rows)
        rows = torch.where(is_new.unsqueeze(-1), new, old)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.weight.dtype)


class ExtendedHead(Extended):
    """A head without a bias, with rows for new tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., D] to [..., V]."""
        return torch.cat([F.linear(x, part) for part in self.parts()], dim=-1)


def install_new_rows(model: PreTrainedModel, rows: NewRows | None) -> list[nn.Parameter]:
    """Give a model rows for new tokens; their values are not set.

    Args:
        model: its weights must be tied already where they are to be; changed in place.
        rows: how many; None leaves the model as it is.

    Returns:
        The parameters that hold them: the embedding's, and the head's where it is not tied.

    Raises:
        UserError: the model's embedding or head does more than to look up, or to multiply.
    """
    if rows is None:
        return []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    scales = hasattr(embedding, "embed_scale")
    if not isinstance(embedding, nn.Embedding) or not (type(embedding) is nn.Embedding or scales):
        raise _unknown(model, f"an embedding of the type {type(embedding).__name__}")
    if type(head) is not nn.Linear or head.bias is not None:
        raise _unknown(model, f"a head of the type {type(head).__name__}, or one with a bias")

    def empty(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.new_empty(rows.count, weight.shape[1]), requires_grad=weight.requires_grad)

    new_embedding = ExtendedEmbedding(embedding, empty(embedding.weight), rows)
    is_tied = head.weight is embedding.weight
    new_head = ExtendedHead(head, new_embedding.new_rows if is_tied else empty(head.weight), rows)
    _replace(model, embedding, new_embedding)
    _replace(model, head, new_head)
    return [new_embedding.new_rows, *([] if is_tied else [new_head.new_rows])]


def _unknown(model: nn.Module, what: str) -> UserError:
    return UserError(
        f"model.tokenizer: {type(model).__name__} has {what}, to which rows can't be added yet; leave it out"
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def new_rows(model: nn.Module, *, that_train: bool = False) -> list[nn.Parameter]:
    """The parameters that hold rows for new tokens, each once; none where the tokenizer is the model's own.

    Args:
        model: any.
        that_train: leave out those of earlier expansions, which are frozen.
    """
    parts = extended_parts(model).values()
    return [part.new_rows for part in parts if part.may_train or not that_train]


def extended_parts(model: nn.Module) -> dict[str, Extended]:
    """By name, the embedding, and the head where it has rows of its own; none if the tokenizer is the model's own."""
    found: dict[str, Extended] = {}
    for name, part in model.named_modules():
        if isinstance(part, Extended) and all(part.new_rows is not other.new_rows for other in found.values()):
            found[name] = part
    return found


def first_new_row(model: Any) -> int | None:
    """The id of the first new token; None where the tokenizer is the model's own."""
    head = model.get_output_embeddings()
    return head.first if isinstance(head, ExtendedHead) else None


def vocabulary_of(model: Any) -> int:
    """Rows of a model's head."""
    head = model.get_output_embeddings()
    return head.num_rows if isinstance(head, ExtendedHead) else len(head.weight)

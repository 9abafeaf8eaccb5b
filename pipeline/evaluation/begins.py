"""How a model's text begins and ends."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Begins:
    """How a model's text begins and ends.

    Attributes:
        tokenizer: the model's.
        beginning: the token that a document begins with: BOS, or without one the document separator.
        separator: the token that ends a document.
    """

    tokenizer: Any
    beginning: int
    separator: int

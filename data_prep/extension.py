"""An extended tokenizer: the model's own with more tokens, whose ids come after all of its ids."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

KEY = "model.tokenizer"
MAKE_ONE = "python -m data_prep extend-tokenizer makes one that fits"
SPLITTERS = ("normalizer", "pre_tokenizer")  # parts of a tokenizer's definition that come before its model


@dataclass(frozen=True)
class NewTokens:
    """What an extended tokenizer adds to the model's own.

    Attributes:
        first: the id of the first new token: the number of ids of the model's own tokenizer, or of the model's rows
            where these are fewer. The model may have rows for ids from here on that no text could use; new tokens
            take their place.
        pieces: for each new token, in the order of ids, the ids that the model's own tokenizer splits it into.
    """

    first: int
    pieces: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.pieces)

    def vocabulary(self, vocab_size: int) -> int:
        """Rows of a model of ``vocab_size`` rows once it has been extended."""
        return max(vocab_size, self.first + self.count)


def find_new_tokens(own: Any, extended: Any, vocab_size: int, folder: str) -> NewTokens | None:
    """What ``extended`` adds to ``own``, both of ``transformers``; None where it adds nothing.

    Args:
        own: the model's tokenizer.
        extended: that of ``model.tokenizer``.
        vocab_size: rows of the model.
        folder: of the extended one, for messages.

    Raises:
        UserError: it is not the model's tokenizer with more tokens after it.
    """
    old, vocabulary = own.get_vocab(), extended.get_vocab()
    _check_old_ids(old, vocabulary, folder)
    first = min(max(old.values()) + 1, vocab_size)
    by_id = {number: token for token, number in vocabulary.items() if number >= first}
    added = set(by_id.values()) - old.keys()
    _check_splitting(_definition(own), _definition(extended), folder)
    if not added:
        return None
    wanted = range(first, max(by_id) + 1)
    stray = next((token for token in sorted(added) if vocabulary[token] < first), None)
    if stray is not None or set(wanted) != set(by_id):
        what = (
            f"{stray!r} has the id {vocabulary[stray]}"
            if stray is not None
            else f"no token has the id {min(set(wanted) - set(by_id))}"
        )
        raise UserError(f"{KEY}: {folder}: {what}; new tokens take the ids from {first} on, without a gap: {MAKE_ONE}")
    pieces = tuple(_pieces(own, extended, [by_id[number] for number in wanted]))
    empty = next((by_id[number] for number, found in zip(wanted, pieces, strict=True) if not found), None)
    if empty is not None:
        raise UserError(
            f"{KEY}: {folder}: the model's own tokenizer can't split the new token {empty!r}, so its row has nothing "
            f"to start from; leave it out: {MAKE_ONE}"
        )
    return NewTokens(first, pieces)


def _check_old_ids(old: dict[str, int], vocabulary: dict[str, int], folder: str) -> None:
    """Check that all old tokens are there, under their ids."""
    for token, number in sorted(old.items(), key=lambda entry: entry[1]):
        found = vocabulary.get(token)
        if found != number:
            has = "no such token" if found is None else f"it with the id {found}"
            raise UserError(
                f"{KEY}: {folder}: the model's tokenizer has {token!r} with the id {number}, this one has {has}; old "
                f"tokens keep their ids and new ones come after them: {MAKE_ONE}"
            )


def _definition(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def _check_splitting(own: dict[str, Any], extended: dict[str, Any], folder: str) -> None:
    """Check that text reaches the new tokens by way of the old ones: else old text would be split otherwise."""
    for part in SPLITTERS:
        if own[part] != extended[part]:
            raise UserError(
                f"{KEY}: {folder}: its {part} is not that of the model's tokenizer, so known text would be split "
                f"otherwise than the model has learned; {MAKE_ONE}"
            )
    kinds = own["model"]["type"], extended["model"]["type"]
    if kinds[0] != kinds[1]:
        raise UserError(f"{KEY}: {folder}: is a {kinds[1]} tokenizer, but the model's is a {kinds[0]} one; {MAKE_ONE}")
    merges = [merges_of(definition) for definition in (own, extended)]
    known = set(merges[0])
    if [merge for merge in merges[1] if merge in known] != merges[0]:
        raise UserError(
            f"{KEY}: {folder}: the merges of the model's tokenizer are not all there in their order, so known text "
            f"would be split otherwise than the model has learned; {MAKE_ONE}"
        )


def merges_of(definition: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, most urgent first; none where its model has no merges."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in definition["model"].get("merges", []))
    return [(left, right) for left, right in pairs]


def _pieces(own: Any, extended: Any, tokens: list[str]) -> Iterator[tuple[int, ...]]:
    """The ids of each new token's pieces: those of its text where it is an added token, else of the token itself."""
    backend, added = own.backend_tokenizer, extended.added_tokens_encoder
    backend.encode_special_tokens = True
    try:
        for token in tokens:
            if token in added:
                yield tuple(backend.encode(token, add_special_tokens=False).ids)
            else:
                yield tuple(piece.id for piece in backend.model.tokenize(token))
    finally:
        backend.encode_special_tokens = False

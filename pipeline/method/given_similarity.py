"""Similarities that were measured elsewhere: another run's similarity.json, or a published one."""

import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, sha256_file
from pipeline.method.similarity import layer_similarity, names_of_pairs
from pipeline.records.similarity import Similarity

KEY = "experts.similarity"


def given_similarity(path: Path, num_layers: int) -> Similarity:
    """Read a file of similarities and check that it fits the model.

    A file without ``by_layer`` is one that was published: S_l is worked out from its ``pairs`` of ``old`` and ``new``
    languages. What else it holds is left out.

    Args:
        path: of the file.
        num_layers: of the model.

    Raises:
        UserError: there is no such file, it holds no similarities, or those of another number of layers.
    """
    tree = _read(path)
    known = {name: tree[name] for name in Similarity.model_fields if name in tree}
    try:
        known.setdefault("tokens", {})
        if "by_layer" not in known:
            known["by_layer"] = _published(known)
        found = Similarity.model_validate(known)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{KEY}: {path} holds no similarities: it needs old, new, pairs (el&en: a number per layer) and by_layer, "
            "as a run's similarity.json has them"
        ) from error
    if len(found.by_layer) != num_layers:
        raise UserError(
            f"{KEY}: {path} has {len(found.by_layer)} layers, but the model has {num_layers}; name one that was "
            "measured on a model with as many"
        )
    return found


def hash_of_given(path: Path) -> str:
    """What the allocation names the file's content by, as it names what was measured.

    Raises:
        UserError: there is no such file.
    """
    _check_there(path)
    return sha256_file(path)[:16]


def _check_there(path: Path) -> None:
    if not os.path.isfile(path):
        raise UserError(f"{KEY}: {path} is not there; name another run's similarity.json, or leave it out to measure")


def _read(path: Path) -> dict[str, Any]:
    _check_there(path)
    try:
        tree = read_json(path)
    except UserError as error:
        raise UserError(f"{KEY}: {path} can't be read as JSON; name a run's similarity.json") from error
    return tree if isinstance(tree, dict) else {}


def _published(known: dict[str, Any]) -> list[float]:
    """S_l of a file that has pairs alone, over all pairs of new languages and of a new and an old one."""
    new, old, given = known["new"], known["old"], known["pairs"]
    pairs = {"&".join(reversed(name.split("&"))): values for name, values in given.items()} | given
    return layer_similarity(pairs, *names_of_pairs(old, new))

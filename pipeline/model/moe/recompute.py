"""Activation checkpointing computes a layer's forward again in the backward, but does not exchange rows again."""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, TypeVar

T = TypeVar("T")
_current: ContextVar["_Exchanges | None"] = ContextVar("exchanges", default=None)


class _Exchanges:
    """A context in which :func:`exchanged` keeps results, or returns those that were kept, in the same order."""

    def __init__(self, kept: list[Any], *, replays: bool) -> None:
        self.kept = kept
        self.replays = replays
        self.position = 0
        self.token: Token[Any] | None = None

    def __enter__(self) -> None:
        self.position, self.token = 0, _current.set(self)

    def __exit__(self, *_: object) -> None:
        assert self.token is not None
        _current.reset(self.token)

    def result(self, communicate: Callable[[], Any]) -> Any:
        if not self.replays:
            self.kept.append(communicate())
        self.position += 1
        return self.kept[self.position - 1]


def keep_exchanges() -> tuple[_Exchanges, _Exchanges]:
    """The contexts of a checkpointed forward and of its recomputation: ``context_fn`` of torch's ``checkpoint``."""
    kept: list[Any] = []
    return _Exchanges(kept, replays=False), _Exchanges(kept, replays=True)


def exchanged(communicate: Callable[[], T]) -> T:
    """What ``communicate()`` returns; in a recomputation what it returned in the forward, without calling it."""
    current = _current.get()
    result: T = communicate() if current is None else current.result(communicate)
    return result

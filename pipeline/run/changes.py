"""What has changed since a step was done, in the words of the run's YAML."""

from dataclasses import dataclass
from typing import Any

_SETS = ("sets.", "benchmarks.")  # of a step's inputs: the texts that it reads, by name
_TEXT = ("data", "model", "seed", "stage1.tokens")  # a share of stage 1 is replayed
_METHOD = "method.name"
_UPCYCLED = (*_TEXT, "similarity", "experts", "deepspeed", _METHOD)
# By the first word of an input: the keys of the run that it follows from. {step} stands for the step, {name} for
# the rest of the input's name.
_KEYS: dict[str, tuple[str, ...]] = {
    "sets": (*_TEXT, "{step}.old_share"),
    "benchmarks": _TEXT,
    "texts": _TEXT,
    "tokenizer": ("data.tokenizer", "data.separator", "data.bos", "model"),
    "old": ("data.old.{name}",),
    "new": ("data.new.{name}",),
    "weights": ("data.old.{name}", "data.new.{name}", "{step}.old_share"),
    "temperature": ("data.temperature",),
    "isolate_documents": ("data.isolate_documents",),
    "dtype": ("deepspeed",),
    "settings": ("{step}.{name}", _METHOD),
    "model": ("model", _METHOD),
    "experts": ("experts.{name}",),
    "init": ("experts.init",),
    "drop_ratio": ("experts.drop_ratio", "experts.init"),
    "noise": ("experts.noise",),
    "bad_steps": ("bad_steps.{name}",),
    "not_positive": ("similarity.not_positive",),
    "similarity": _UPCYCLED,
    "plan": _UPCYCLED,
    "upcycled": _UPCYCLED,
    "stage1": (*_UPCYCLED, "stage1", "bad_steps"),
    "stages": (*_UPCYCLED, "stage1", "stage2", "bad_steps"),
    "window": ("evaluate.window",),
    "prompts": ("evaluate.prompts", "evaluate.new_tokens"),
}
_GROUPS = ("data.old.", "data.new.", "data.watch.", "data.benchmarks.")


@dataclass(frozen=True)
class Change:
    """A leaf of nested dictionaries that differs; None where it is not there."""

    key: str
    before: Any
    now: Any

    @property
    def adds_or_removes_a_set(self) -> bool:
        """Whether it is a text that a step reads, or read."""
        return self.key.startswith(_SETS) and (self.before is None or self.now is None)

    def __str__(self) -> str:
        """The key and its two values."""
        if isinstance(self.now, dict):
            return f"{self.key} is new"
        if isinstance(self.before, dict):
            return f"{self.key} is gone"
        return f"{self.key} was {_short(self.before)}, is {_short(self.now)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def differences(before: Any, now: Any, key: str = "") -> list[Change]:
    """The leaves that differ; a dictionary that one side lacks counts as a leaf."""
    if before == now:
        return []
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [Change(key, before, now)]
    found = []
    for name in sorted({*before, *now}):
        found += differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    return found


def explain(step: str, changes: list[Change], before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Changed inputs of a step as the keys of the run that they follow from, each with its two values.

    Args:
        step: its name.
        changes: what differs between its inputs.
        before: the run's settings when the step was done, as nested dictionaries.
        now: those of now.
    """
    settings = differences(before, now)
    lines: list[str] = []
    for change in changes:
        found = _causes(step, change, settings)
        lines += [str(cause) for cause in found] or [_without_a_key(change)]
    return list(dict.fromkeys(lines))


def _causes(step: str, change: Change, settings: list[Change]) -> list[Change]:
    """Of the changed settings, those that a changed input follows from; its own rather than those of other sets."""
    first, _, name = change.key.partition(".")
    keys = [key.format(step=step, name=name) for key in _KEYS.get(first, (first,))]
    found = [one for one in settings if any(_is_within(one.key, key) or _is_within(key, one.key) for key in keys)]
    if first == "method" and any(one.key == _METHOD for one in found):
        return [one for one in found if one.key == _METHOD]  # each method has options of its own
    if first not in ("sets", "benchmarks", "texts"):
        return found
    found = [one for one in found if not _is_how_it_is_drawn(one.key)]
    own = [one for one in found if not one.key.startswith(_GROUPS) or one.key.split(".")[2] == name]
    return own or found


def _is_how_it_is_drawn(key: str) -> bool:
    """Whether a key of ``data`` says how samples are drawn from sets, rather than what is in them."""
    of_a_set = key.startswith(_GROUPS) and key.endswith((".weight", ".language"))
    return of_a_set or key in ("data.temperature", "data.isolate_documents")


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _without_a_key(change: Change) -> str:
    """No setting has changed, so what a setting names has."""
    first, _, name = change.key.partition(".")
    if first in ("sets", "texts", "benchmarks"):
        return f"the text of {name} has changed"
    if first in ("model", "tokenizer"):
        return f"the {first}'s files have changed"
    if first in ("similarity", "plan", "upcycled", "stage1", "stages"):
        return f"{name or first} has been made again"
    return str(change)

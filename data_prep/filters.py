"""What is done to one document, and whether it is dropped: normalisation, length, language. Each is optional."""

import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from data_prep.config import FiltersConfig, SetConfig

IDENTIFIED_CHARACTERS = 3000  # of a document's head; more hardly changes what an identifier says


class Filtered(NamedTuple):
    """A document after the filters: its text, whether that was changed, and why it is dropped, if it is."""

    text: str
    changed: bool
    reason: str | None


class Filters:
    """The filters of one set.

    Raises:
        UserError: the language identifier can't be loaded, or does not know the set's language.
    """

    def __init__(self, config: FiltersConfig, entry: SetConfig, name: str) -> None:
        self._config = config
        self._language: Callable[[str], float] | None = None
        if config.language is not None:
            label = entry.language_label or entry.language or name
            self._language = language_probability(config.language.identifier, label, name)

    def apply(self, text: str) -> Filtered:
        """Change a text and judge it."""
        changed = self.normalize(text)
        return Filtered(changed, changed != text, self._reason(changed))

    def normalize(self, text: str) -> str:
        """The text as it is written to shards."""
        config = self._config
        if config.fix_text:
            import ftfy

            text = ftfy.fix_text(text, unescape_html=False, uncurl_quotes=False, normalization=None)
        return unicodedata.normalize(config.normalize, text) if config.normalize else text

    def _reason(self, text: str) -> str | None:
        config = self._config
        if not text.strip():
            return "empty"
        if config.min_characters is not None and len(text) < config.min_characters:
            return "too_short"
        if config.max_characters is not None and len(text) > config.max_characters:
            return "too_long"
        if self._language is not None and config.language is not None:
            sample = text[:IDENTIFIED_CHARACTERS].replace("\n", " ")
            if self._language(sample) < config.language.threshold:
                return "language"
        return None


def language_probability(identifier: str, label: str, name: str) -> Callable[[str], float]:
    """A function from a text to the probability of its being in the language `label`; 0 where another is likelier.

    Raises:
        UserError: no such identifier, or it does not know the label; `name` is the set's, for the message.
    """
    classify, labels = _identifier(identifier)
    if label not in labels:
        near = sorted(known for known in labels if known[:2] == label[:2]) or sorted(labels)
        raise UserError(
            f"data: set {name}: the language code {label!r} is not one that {identifier} knows "
            f"({', '.join(near[:12])}{', …' if len(near) > 12 else ''}); set the set's language_label"
        )

    def probability(text: str) -> float:
        found, value = classify(text)
        return value if found == label else 0.0

    return probability


@lru_cache(maxsize=4)
def _identifier(name: str) -> tuple[Callable[[str], tuple[str, float]], frozenset[str]]:
    if name == "py3langid":
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        langid = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return lambda text: _pair(langid.classify(text)), frozenset(langid.labels)
    if not Path(name).is_file():
        raise UserError(
            f"data.filters.language.identifier: {name} is not a file; name py3langid or a fastText model.bin"
        )
    try:
        import fasttext
    except ImportError as error:
        raise UserError(
            "data.filters.language.identifier: a fastText model needs a package: pip install fasttext-predict"
        ) from error
    try:
        model = fasttext.load_model(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"data.filters.language.identifier: {name} is not a fastText model ({error})") from error
    labels, _ = model.predict("a", k=-1)  # every one that it knows
    return lambda text: _of_fasttext(model.predict(text)), frozenset(map(_plain, labels))


def _pair(found: Any) -> tuple[str, float]:
    return str(found[0]), float(found[1])


def _of_fasttext(found: Any) -> tuple[str, float]:
    return _plain(found[0][0]), float(found[1][0])


def _plain(label: str) -> str:
    return label.removeprefix("__label__")

"""Documents to token ids: [BOS where the tokenizer prepends one] + text + [document separator]."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.files import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
)  # pretraining's document separators, where a chat model's eos is another
UINT16_VOCABULARY = 1 << 16


class DocumentEncoder:
    """A fast tokenizer with the choices that make a document of its ids.

    Attributes:
        separator, separator_id: the token that ends a document.
        bos_id: the id that the tokenizer by itself puts in front of a text, or None.
        key: changes with anything that changes a document's ids.
    """

    def __init__(self, tokenizer_path: str, separator: str, vocab_size: int, revision: str | None = None) -> None:
        """Load the tokenizer at a folder or hub id.

        Raises:
            UserError: no fast tokenizer there, no such separator, or ids that the model has no embedding for.
        """
        tokenizer = _load(tokenizer_path, revision)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.separator = _choose_separator(separator, vocabulary, tokenizer.eos_token, tokenizer_path)
        self.separator_id = vocabulary[self.separator]
        self.bos_id = _prepended_bos(tokenizer)
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        written = [i for i in vocabulary.values() if i not in special] + [self.separator_id, self.bos_id or 0]
        if max(written) >= vocab_size:
            raise UserError(
                f"{tokenizer_path}: the tokenizer has ids up to {max(written)} but the model's vocabulary ends at "
                f"{vocab_size - 1}; set data.tokenizer to the tokenizer that the model was trained with"
            )
        definition = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        self.key = content_key([definition, self.separator_id, self.bos_id])
        # A text that happens to spell a special token, such as a web page about tokenizers, stays text. Set last:
        # a call of the transformers tokenizer, as in _prepended_bos, sets it back.
        self._backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each document, BOS and separator included."""
        front = [] if self.bos_id is None else [self.bos_id]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*front, *encoding.ids, self.separator_id], dtype=np.int64) for encoding in encodings]

    @property
    def num_added(self) -> int:
        """Ids of a document that are not its text: the separator, and BOS if there is one."""
        return 1 if self.bos_id is None else 2


def choose_dtype(setting: Literal["auto", "uint16", "int32"], vocab_size: int) -> Literal["uint16", "int32"]:
    """The shards' dtype, "uint16" or "int32", from `data.token_dtype`.

    Raises:
        UserError: uint16 is asked for and can't hold the vocabulary.
    """
    fits = vocab_size <= UINT16_VOCABULARY
    if setting == "uint16" and not fits:
        raise UserError(
            f"data.token_dtype: uint16 holds ids up to {UINT16_VOCABULARY - 1} but the model's vocabulary has "
            f"{vocab_size}; set data.token_dtype=int32 or auto"
        )
    return ("uint16" if fits else "int32") if setting == "auto" else setting


def _load(tokenizer_path: str, revision: str | None) -> "PreTrainedTokenizerBase":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about missing model libraries or long texts
    from transformers import AutoTokenizer

    if tokenizer_path.startswith((".", "/")) and not Path(tokenizer_path).is_dir():
        raise UserError(f"{tokenizer_path}: no such folder; set data.tokenizer or model.path to one with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, revision=revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{tokenizer_path}: no tokenizer can be loaded ({reason}); set data.tokenizer to one with a tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer_path}: not a fast tokenizer; save it with tokenizer.json and name that folder")
    return tokenizer


def _choose_separator(setting: str, vocabulary: dict[str, int], eos: str | None, tokenizer_path: str) -> str:
    """The setting's token; for "auto" the first of pretraining's separators there is, else the tokenizer's eos."""
    if setting != "auto":
        if setting not in vocabulary:
            raise UserError(
                f"data.separator: {setting!r} is not a token of {tokenizer_path}; name one that is, or auto"
            )
        return setting
    for candidate in (*SEPARATORS, eos):
        if candidate in vocabulary:
            return candidate
    raise UserError(
        f"data.separator: {tokenizer_path} has no {', '.join(SEPARATORS)} and no eos token; set data.separator"
    )


def _prepended_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The BOS id if the tokenizer puts it in front of a text unasked."""
    ids = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token_id if begins else None

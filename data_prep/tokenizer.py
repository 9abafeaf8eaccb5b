"""Documents to token ids: [BOS where the tokenizer prepends one] + text + [document separator]."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, one_line
from common.files import content_key, write_bytes

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
)  # pretraining's document separators, where a chat model's eos is another
UINT16_VOCABULARY = 1 << 16

Kind = Literal["fast", "sentencepiece"]
FILES: dict[Kind, str] = {"fast": "tokenizer.json", "sentencepiece": "tokenizer.model"}


@dataclass(frozen=True)
class TokenizerSpec:
    """The choices that make a document's ids, besides the tokenizer's own definition.

    Attributes:
        kind: "fast" is a tokenizer.json of `tokenizers`, "sentencepiece" a .model of `sentencepiece`.
        separator, separator_id: the token that ends a document.
        bos_id: the id that the tokenizer by itself puts in front of a text, or None.
        definition: the hash of its definition.
        key: changes with anything that changes a document's ids.
    """

    kind: Kind
    separator: str
    separator_id: int
    bos_id: int | None
    definition: str
    key: str

    @property
    def num_added(self) -> int:
        """Ids of a document that are not its text: the separator, and BOS if there is one."""
        return 1 if self.bos_id is None else 2


class DocumentEncoder:
    """A tokenizer with the choices that make a document of its ids; `spec` names them."""

    def __init__(self, spec: TokenizerSpec, definition: bytes) -> None:
        self.spec, self._definition = spec, definition
        self._encode = _encode_fast(definition) if spec.kind == "fast" else _encode_sentencepiece(definition)

    @classmethod
    def create(
        cls, path: str, separator: str, vocab_size: int, revision: str | None = None, *, begins_with_bos: bool = True
    ) -> "DocumentEncoder":
        """The tokenizer at a folder, hub id or SentencePiece file.

        Args:
            path: of the tokenizer.
            separator: the token that ends a document, or "auto".
            vocab_size: of the model.
            revision: of a hub id.
            begins_with_bos: whether a document begins with the BOS that the tokenizer by itself puts there.

        Raises:
            UserError: no tokenizer there, no such separator, or ids that the model has no embedding for.
        """
        if Path(path).is_file():
            return cls(*_sentencepiece_spec(path, separator, vocab_size, begins_with_bos))
        return cls(*_fast_spec(path, separator, vocab_size, revision, begins_with_bos))

    @classmethod
    def load(cls, folder: Path, spec: TokenizerSpec) -> "DocumentEncoder":
        """What `save` wrote; reads no more than the definition."""
        return cls(spec, (folder / FILES[spec.kind]).read_bytes())

    def save(self, folder: Path) -> None:
        """Keep the definition in a folder, for `load` in other processes."""
        write_bytes(folder / FILES[self.spec.kind], self._definition)

    def encode(self, texts: Sequence[str], dtype: Any = np.int64) -> list[NDArray[np.integer]]:
        """Token ids of each document as `dtype`, BOS and separator included: 1-D arrays.

        Raises:
            OverflowError: an id does not fit the dtype.
        """
        front = [] if self.spec.bos_id is None else [self.spec.bos_id]
        end = self.spec.separator_id
        return [np.array([*front, *ids, end], dtype=dtype) for ids in self._encode(texts)]


def load_decoder(folder: Path) -> Callable[[Sequence[int]], str]:
    """What turns ids into text, by the tokenizer kept in a folder; special tokens are shown."""
    if (folder / FILES["fast"]).is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / FILES["fast"]))
        return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / FILES["sentencepiece"]))
    return lambda ids: str(processor.decode(list(ids)))


def _encode_fast(definition: bytes) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that happens to spell a special token, such as a web page about tokenizers, stays text.
    tokenizer.encode_special_tokens = True
    return lambda texts: (
        encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    )


def _encode_sentencepiece(definition: bytes) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=definition)
    return lambda texts: processor.encode(list(texts), out_type=int, num_threads=1)


def dtype_of(vocab_size: int) -> Literal["uint16", "int32"]:
    """The shards' dtype: uint16 where it holds every id."""
    return "uint16" if vocab_size <= UINT16_VOCABULARY else "int32"


def _sentencepiece_spec(
    path: str, separator: str, vocab_size: int, begins_with_bos: bool
) -> tuple[TokenizerSpec, bytes]:
    import sentencepiece

    definition = Path(path).read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=definition)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: not a SentencePiece model; name one, or the folder of a transformers tokenizer"
        ) from error
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    eos = processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
    separator = _choose_separator(separator, vocabulary, eos, path)
    has_bos = begins_with_bos and processor.bos_id() >= 0  # Llama, Mistral and Gemma begin a text with it
    bos = processor.bos_id() if has_bos else None
    _check_vocabulary(path, len(vocabulary) - 1, vocab_size)
    return _spec("sentencepiece", separator, vocabulary[separator], bos, definition), definition


def _fast_spec(
    path: str, separator: str, vocab_size: int, revision: str | None, begins_with_bos: bool
) -> tuple[TokenizerSpec, bytes]:
    tokenizer = load_tokenizer(path, revision)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    separator = _choose_separator(separator, vocabulary, tokenizer.eos_token, path)
    bos = _prepended_bos(tokenizer) if begins_with_bos else None
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = [i for i in vocabulary.values() if i not in special] + [vocabulary[separator], bos or 0]
    _check_vocabulary(path, max(written), vocab_size)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    definition = backend.to_str().encode()
    return _spec("fast", separator, vocabulary[separator], bos, definition), definition


def _spec(kind: Kind, separator: str, separator_id: int, bos_id: int | None, definition: bytes) -> TokenizerSpec:
    sha256 = hashlib.sha256(definition).hexdigest()
    key = content_key([sha256, separator_id, bos_id])
    return TokenizerSpec(kind, separator, separator_id, bos_id, sha256, key)


def _check_vocabulary(path: str, largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {largest} but the model's vocabulary ends at "
            f"{vocab_size - 1}; set data.tokenizer to the tokenizer that the model was trained with"
        )


def load_tokenizer(tokenizer_path: str, revision: str | None, key: str = "data.tokenizer") -> Any:
    """The fast tokenizer of ``transformers`` at a folder or hub id.

    Args:
        tokenizer_path: of the tokenizer.
        revision: of a hub id.
        key: of the run, which errors name.

    Raises:
        UserError: there is none, or it is not a fast one.
    """
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about missing model libraries or long texts
    from transformers import AutoTokenizer

    if tokenizer_path.startswith((".", "/")) and not Path(tokenizer_path).is_dir():
        raise UserError(f"{tokenizer_path}: no such folder; set {key} or model.path to one with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, revision=revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"{tokenizer_path}: no tokenizer can be loaded ({one_line(error)}); set {key} to one that can"
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
        if candidate is not None and candidate in vocabulary:
            return candidate
    raise UserError(
        f"data.separator: {tokenizer_path} has no {', '.join(SEPARATORS)} and no eos token; set data.separator"
    )


def _prepended_bos(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer puts it in front of a text unasked."""
    ids = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token_id if begins else None

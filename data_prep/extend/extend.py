"""`python -m data_prep extend-tokenizer RUN.yaml --add N`: more merges, learned on the new sets' training text."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import content_key, new_folder, write_text
from common.progress import progress
from common.text_table import aligned
from data_prep.config import PreparationConfig
from data_prep.dedup.word_shingles import words_of
from data_prep.extend.definition import BpeDefinition
from data_prep.extend.merges import LEAST, MergeLearner
from data_prep.extension import NewTokens, find_new_tokens
from data_prep.make_plan import Planned
from data_prep.prepare import plan_preparation
from data_prep.sample import sample_documents
from data_prep.tokenizer import DocumentEncoder, load_tokenizer

TOKENS = 5_000_000  # read of each set, by the model's own tokenizer
COVERAGE = 0.9995  # of the characters that have no token: so many get one
MEASURED = 20  # one document of so many is not learned from, but measured on
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class _Text:
    """Documents of one set."""

    group: str
    learned: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)


def extend_tokenizer(config: PreparationConfig, add: int, target: Path, tokens: int = TOKENS) -> NewTokens:
    """Write the model's own tokenizer with more tokens to a folder, and print what it does for each set.

    Args:
        config: what the run says of its text. A ``model.tokenizer`` that it names is left out of account.
        add: how many tokens.
        target: the folder, which must not be there.
        tokens: how many are read of each set, by the model's own tokenizer.

    Raises:
        UserError: the tokenizer can't be extended, the folder is there, or the text has too few words that repeat.
    """
    if add < 1:
        raise UserError(f"--add {add}: not a number of tokens to add; give at least 1, such as 8000")
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: not a number of tokens to read; give at least 1")
    if target.exists():
        raise UserError(f"{target}: is there already; delete it, or name another folder with --to")
    if config.data.tokenizer is not None:
        raise UserError("data.tokenizer: it replaces the model's own tokenizer, which is extended; leave it out")
    config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": None})})
    own = load_tokenizer(config.model.path, config.model.revision, "model.path")
    definition = BpeDefinition(json.loads(own.backend_tokenizer.to_str()), config.model.path)
    planned = plan_preparation(config)
    texts = _read(planned, tokens)
    extended = _learn(definition, texts, add)
    with new_folder(target) as folder:
        own.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name not in _FILES:
                path.unlink()
        write_text(folder / "tokenizer.json", extended.text)
        # As a run will load it.
        vocab_size = max(definition.vocabulary.values()) + 1
        found = find_new_tokens(own, load_tokenizer(str(folder), None), vocab_size, str(folder))
        assert found is not None
        encoder = DocumentEncoder.create(str(folder), planned.encoder.spec.separator, vocab_size + add)
    _print(planned, texts, encoder, definition, extended)
    print(
        f"{target}: the tokenizer of {config.model.path} with {found.count:,} new tokens, ids {found.first:,} to "
        f"{found.first + found.count - 1:,}; use it: --set model.tokenizer={target}",
        flush=True,
    )
    return found


def _read(planned: Planned, tokens: int) -> dict[str, _Text]:
    """Documents of each training set, none of them held out."""
    data = planned.config.data
    found: dict[str, _Text] = {}
    names = [*data.old, *data.new]
    with progress(len(names), "extend-tokenizer: read", "set") as bar:
        for name in names:
            found[name] = _Text(data.group(name))
            for number, document in enumerate(sample_documents(planned, name, tokens, planned.encoder)):
                into = found[name].measured if number % MEASURED == MEASURED - 1 else found[name].learned
                into.append(document.text)
            bar.update(1)
    return found


def _learn(definition: BpeDefinition, texts: dict[str, _Text], add: int) -> BpeDefinition:
    words: dict[str, Counter[str]] = {"new": Counter(), "old": Counter()}
    for text in texts.values():
        words[text.group] += definition.words(text.learned)
    characters = _characters(definition.missing_characters(words["new"]), add // 2)
    with_characters = definition.extended(characters, [])
    often = Counter({word: count for word, count in words["new"].items() if count >= LEAST})
    split = with_characters.split(often, words["old"])
    learner = MergeLearner(split, with_characters.vocabulary, with_characters.never_merged)
    wanted = add - len(characters)
    with progress(wanted, "extend-tokenizer: learn", "merge") as bar:
        merges = learner.learn(wanted, bar.update)
    if len(merges) < wanted:
        most = len(characters) + len(merges)
        raise UserError(
            f"--add {add}: the new sets' text gives only {most:,} tokens that are worth it; give at most {most}, or "
            "more text"
        )
    return definition.extended(characters, merges)


def _characters(missing: Counter[str], most: int) -> list[str]:
    """The most frequent of the characters that have no token, until they cover COVERAGE of all of these."""
    found: list[str] = []
    covered, total = 0, missing.total()
    for character, count in sorted(missing.items(), key=lambda entry: (-entry[1], entry[0])):
        if len(found) == most or count < LEAST or covered >= COVERAGE * total:
            break
        found.append(character)
        covered += count
    return found


def _print(
    planned: Planned, texts: dict[str, _Text], encoder: DocumentEncoder, before: BpeDefinition, after: BpeDefinition
) -> None:
    """A table of what text costs by the old and by the new tokenizer."""
    rows = [["", "tokens per word", "characters per token", "fewer tokens"]]
    for name, text in texts.items():
        costs = [_costs(text.measured or text.learned, one) for one in (planned.encoder, encoder)]
        per_word, per_token = ([f"{cost[unit]:.2f}" for cost in costs] for unit in ("per word", "characters"))
        fewer = 1 - costs[1]["tokens"] / max(1, costs[0]["tokens"])
        rows.append([f"{text.group.upper():4} {name}", " -> ".join(per_word), " -> ".join(per_token), f"{fewer:.1%}"])
    print(aligned(rows, numbers_from=1), flush=True)
    print(
        f"{after.num_merges - before.num_merges:,} merges after the {before.num_merges:,} that were there; measured "
        "on documents that were not learned from, where a set has enough",
        flush=True,
    )
    page = planned.tokens / f"{content_key([planned.keys, _languages(planned)])}.html"
    if page.is_file():
        print(f"figures of all of the text by the model's own tokenizer: {page}", flush=True)


def _languages(planned: Planned) -> dict[str, str]:
    return {name: entry.language for name, entry in planned.config.data.sets.items()}


def _costs(texts: list[str], encoder: DocumentEncoder) -> dict[str, float]:
    """Of texts by a tokenizer: ``tokens``, tokens ``per word``, and ``characters`` per token."""
    tokens = sum(ids.size - encoder.spec.num_added for ids in encoder.encode(texts))
    words, characters = sum(len(words_of(text)) for text in texts), sum(map(len, texts))
    return {"tokens": tokens, "per word": tokens / max(1, words), "characters": characters / max(1, tokens)}

"""Questions which verse follows; lm-eval imports this from the folder of the task's file."""

import heapq
import json
import random
from pathlib import Path
from typing import Any

CONTEXT = 3  # verses that a question shows
PER_CHAPTER = 4  # questions at most
NUM_CHOICES = 4
FETCH = "python -m data_prep.demo --languages en,es,zh,tr,bn"
ROOT = Path(__file__).resolve().parents[3]


def load(file: str, **_others: Any) -> dict[str, Any]:
    """The questions of a file with a chapter per row and a verse per line.

    Args:
        file: below the working folder, or else below the folder of the repository.

    Raises:
        FileNotFoundError: it is in neither.
    """
    from datasets import Dataset

    path = next((path for path in (Path(file), ROOT / file) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {file}: {FETCH} fetches it")
    with open(path, encoding="utf-8") as lines:
        chapters = [json.loads(line)["text"].split("\n") for line in lines]
    return {"test": Dataset.from_list(questions(chapters))}


def questions(chapters: list[list[str]]) -> list[dict[str, Any]]:
    """At most so many of each chapter, evenly spread; the same each time.

    A verse that repeats counts once: some translations give several verses the same text, and a model could copy it.

    Args:
        chapters: the verses of each.

    Returns:
        context: the verses before; choices: the one that follows, among others; answer: its number.
    """
    draw = random.Random(0)
    found = []
    chapters = [list(dict.fromkeys(verses)) for verses in chapters]
    for number, verses in enumerate(chapters):
        places = range(CONTEXT, len(verses))
        others = {verse for other, known in enumerate(chapters) if other != number for verse in known}
        for place in list(places)[:: max(1, len(places) // PER_CHAPTER)][:PER_CHAPTER]:
            true = verses[place]
            choices = [true, *_as_long(others, true)]
            draw.shuffle(choices)
            found.append(
                {
                    "context": "\n".join(verses[place - CONTEXT : place]),
                    "choices": choices,
                    "answer": choices.index(true),
                }
            )
    return found


def _as_long(others: set[str], verse: str) -> list[str]:
    """The wrong choices: different verses whose lengths are nearest, so that length says nothing."""
    return heapq.nsmallest(NUM_CHOICES - 1, others - {verse}, key=lambda other: (abs(len(other) - len(verse)), other))

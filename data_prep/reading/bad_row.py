"""What a reader gives for each row of a file: its fields, or what is wrong with it."""

from typing import Any


class BadRow(Exception):
    """What is wrong with a row, and how to fix it. With `ends`, nothing after it in its file can be read."""

    def __init__(self, problem: str, *, ends: bool = False) -> None:
        super().__init__(problem)
        self.ends = ends


Fields = dict[str, Any]
Row = tuple[int, Fields | BadRow]  # its number in the file, from 1, and its fields or what is wrong with it


def too_long(length: str, max_bytes: int) -> BadRow:
    """A row that is longer than documents may be; `length` is its bytes, for people."""
    return BadRow(f"{length} bytes long, data.max_document_bytes is {max_bytes:,}; split the row or raise the setting")


def not_utf8(error: UnicodeDecodeError, before: int = 0) -> BadRow:
    """A row in another encoding; `before` are its bytes in front of those that were decoded."""
    return BadRow(f"not UTF-8 ({error.reason} at byte {before + error.start}); convert it to UTF-8")

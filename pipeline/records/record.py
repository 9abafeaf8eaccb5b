"""The base of all records: a typed JSON file, written and read by the same class."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError
from common.files import read_json, write_json, write_text


class Record(BaseModel):
    """A file, or a row of one: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Check a value that was read.

        Args:
            value: nested dictionaries, as JSON gives them.
            where: the file, and the row if it has several, for the error.

        Raises:
            UserError: the value does not have this class's fields.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise UserError(
                f"{where}: {key}: {problem['msg']}; another version of this program wrote it: "
                "give the run another name, or delete the file and run its step again"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            UserError: it cannot be read, or another version of this program wrote it.
        """
        return cls.parse(read_json(path), str(path))

    @classmethod
    def load_if_there(cls, path: Path) -> Self | None:
        """:meth:`load`, or None where there is no such file."""
        return cls.load(path) if path.is_file() else None

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load_rows(cls, path: Path) -> list[Self]:
        """The complete rows of a JSON-lines file, each of this class; none where there is no such file.

        Raises:
            UserError: a row is damaged, or another version of this program wrote it.
        """
        rows = enumerate(read_rows(path), start=1)
        return [cls.parse(row, f"{path}, row {number}") for number, row in rows]

    def append_to(self, path: Path) -> None:
        """Add the record to a JSON-lines file."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(self.as_line())

    def as_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(self.model_dump(mode="json")) + "\n"

    @classmethod
    def drop_rows_after(cls, path: Path, step: int) -> list[Self]:
        """Rewrite a JSON-lines file without the rows of steps after ``step``; returns the rows that are left."""
        kept = [row for row in cls.load_rows(path) if getattr(row, "step", 0) <= step]
        write_text(path, "".join(row.as_line() for row in kept))
        return kept


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSON-lines file; a last line that was cut off is left out.

    Raises:
        UserError: a line before it is damaged.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: damaged; delete the line and run again") from error
    return rows

"""``manifests/STEP.json``: that a step is done, from which inputs, with which outputs and figures."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any, Literal, Self

from common.errors import UserError
from common.files import read_json
from pipeline.records.record import Record

FORMAT: Literal[4] = 4  # raised when a run folder of before cannot be read any more
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")


class StepInputs(Record):
    """What a step is done with.

    Attributes:
        inputs: all that its result depends on, as nested dictionaries.
        run: the settings of the run, resolved: they say in the user's words why inputs have changed.
    """

    inputs: dict[str, Any]
    run: dict[str, Any]


class StepManifest(Record):
    """A finished step.

    Attributes:
        format: of the run folder.
        step: its name.
        done_with: its inputs.
        outputs: what later steps find its result by.
        figures: what it took and gave: ``seconds``, and what each step adds.
        versions: of Python and the packages it ran with.
    """

    format: Literal[4] = FORMAT
    step: str
    done_with: StepInputs
    outputs: dict[str, Any]
    figures: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, step: str, done_with: StepInputs, outputs: dict[str, Any], figures: dict[str, Any]) -> Self:
        """The manifest of a step that has just ended."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        return cls(step=step, done_with=done_with, outputs=outputs, figures=figures, versions=versions)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a manifest.

        Raises:
            UserError: it is damaged, or of a run folder that another version of this program made.
        """
        value = read_json(path)
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{path.parent.parent}: was made by an earlier version of this program (format {found or 1}, this is "
                f"{FORMAT}); give the run another name, or delete the folder"
            )
        return cls.parse(value, str(path))

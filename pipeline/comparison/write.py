"""``python -m pipeline compare``: the table on the screen, ``compare.html`` and ``compare.json`` in a folder."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from pipeline.comparison.compare import compare
from pipeline.comparison.page import page
from pipeline.comparison.read import find_folder, read_runs
from pipeline.comparison.table import as_text
from pipeline.records.comparison import Comparison

PAGE_FILE, RECORD_FILE = "compare.html", "compare.json"


def compare_runs(names: Sequence[str], against: str | None = None, to: Path | None = None) -> Comparison:
    """Compare runs, print the tables, and write the page and the record.

    Args:
        names: folders of runs, or their YAMLs.
        against: the run to pair the others with; it is compared too if it is not among them.
        to: where the files go; None for a folder beside the first run's, see :func:`default_folder`.

    Raises:
        UserError: one is not a run or not evaluated, they are scored on different sets, or ``to`` can't be written.
    """
    runs = read_runs([*names, *([against] if against else [])])
    named = next((one for one in runs if against and one.folder.path.samefile(find_folder(against))), None)
    comparison = compare(runs, named)
    folder = to or default_folder([one.folder.path for one in runs])
    print(as_text(comparison), flush=True)
    try:
        comparison.save(folder / RECORD_FILE)
        write_text(folder / PAGE_FILE, page(comparison))
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); give another folder with --to") from error
    print(f"\ncompare: {folder / PAGE_FILE}", flush=True)
    return comparison


def default_folder(runs: Sequence[Path]) -> Path:
    """``compare-A-B`` beside run A's folder for one or two runs, ``compare-A-and-N-more`` for more."""
    first, *others = runs
    rest = [others[0].name] if len(others) == 1 else [f"and-{len(others)}-more"] if others else []
    return first.parent / "-".join(["compare", first.name, *rest])

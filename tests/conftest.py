"""What all tests share."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

TOGETHER = ("cluster", "gpu")  # folders whose tests share what takes long to start
APART = ("launch", "faults")  # each test starts its own processes


@pytest.hookimpl(tryfirst=True)  # before xdist, which puts the groups into the tests' ids
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in two processes, say which of them go to the same one: by default, those of a file.

    A file whose tests share what takes long to make may say so itself, by the mark that is added here.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        group = folder if folder in TOGETHER else item.name if folder in APART else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))

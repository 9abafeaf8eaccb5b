"""One cluster for all tests of a session: starting it takes seconds."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason and os.geteuid() == 0 and os.environ.get("SKIP_CLUSTER") != "1":
        pytest.fail(f"{reason}; SKIP_CLUSTER=1 leaves the cluster's tests out")
    if reason:
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with both nodes idle; a test's jobs are ended with it."""
    yield _cluster
    _cluster.run("scancel", "--user=root", check=False)
    _cluster.wait_until_idle()

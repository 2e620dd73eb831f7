"""A real `ds4 serve` with the embedded model, shared by the tests that only ask it things."""

from collections.abc import Iterator

import pytest

from tests.server.process import Served, start, stop


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("serve"))
    try:
        yield running
    finally:
        assert stop(running) == 0

"""One bundle for all tests of streaming."""

from pathlib import Path

import pytest

from tests.experts import models


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one size. Not to be written to."""
    return models.make(tmp_path_factory.mktemp("experts"))

"""Fixtures shared by the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import pytest
import transformers

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def small_readonly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of two layers (`helpers.SMALL`), the same one for all tests."""
    directory = tmp_path_factory.mktemp("small")
    helpers.random_checkpoint(directory)
    return directory


@pytest.fixture
def small(small_readonly: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may damage."""
    return Path(shutil.copytree(small_readonly, tmp_path / "small"))

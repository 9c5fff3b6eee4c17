"""Fixtures shared by the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from jaxgpt2.linear import LinearGPT2
    from jaxgpt2.models.gpt2.pretrained import GPT2


if "PYTEST_XDIST_WORKER" not in os.environ:
    # All processes of a run, those that tests start among them, compile a program once (a size makes JAX lock it), and
    # keep nothing in the user's directories.
    _kept = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, _kept, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = _kept
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_kept}/jax"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


# Files whose few tests take long: first, so that no core is left with one of them at the end.
LONG = {
    f"test_{name}.py"
    for name in ("serving", "examples", "docs", "end_to_end", "polynomial_on_ckks", "decoding", "encrypted")
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def small_readonly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of two layers (`helpers.SMALL`), the same one for all tests."""
    from helpers import random_checkpoint  # imports torch, which most tests can do without

    directory = tmp_path_factory.mktemp("small")
    random_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def gpt2(small_readonly: Path) -> GPT2:
    """That model, loaded. Tests that read 64 tokens of one text share its compiled programs."""
    from jaxgpt2.models.gpt2.pretrained import GPT2

    return GPT2.from_pretrained(small_readonly)


@pytest.fixture(scope="session")
def linear_gpt2(gpt2: GPT2) -> LinearGPT2:
    """That model with its linear layers in integers."""
    from jaxgpt2.linear import LinearGPT2
    from linears import PASSAGES

    return LinearGPT2.quantize(gpt2, PASSAGES)


@pytest.fixture
def small(small_readonly: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may damage."""
    return Path(shutil.copytree(small_readonly, tmp_path / "small"))


# A first example compiles; and machines are shared.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

"""Command lines that a grammar makes, most of them wrong: each is done, or refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

import commands


@pytest.fixture(scope="module")
def place(small_readonly: Path, tmp_path_factory) -> Any:
    directory = tmp_path_factory.mktemp("place")
    commands.make_place(directory, small_readonly)
    with pytest.MonkeyPatch.context() as patch, commands.contained(directory, small_readonly):
        patch.chdir(directory)
        yield directory


@settings(max_examples=100, suppress_health_check=list[Any](HealthCheck))
@given(line=commands.lines())
@example(line=["check-attention", "", "--model", "\x1b"])
@example(line=["serve", "--port", "9" * 5000, ""])
def test_no_command_line_ends_in_a_traceback(place, line):
    assert commands.problem(commands.run(line)) is None

"""Bytes that others wrote, a little damaged: every reader takes them or raises its own error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import parsers

NAMES = [
    "envelope", "envelope with the right checksum", "rlwe request", "rlwe answer", "batch", "answer", "key status",
    "session", "problem", "bundle", "tensors of a client", "matrices of a server", "tokenizer of a client",
    "generation configuration of a client", "circuit",
    "configurations", "sweep", "rows", "checkpoint's configuration", "generation configuration", "vocabulary", "masks",
]  # fmt: skip


@pytest.fixture(scope="module")
def known(linear_gpt2, small_readonly, tmp_path_factory) -> dict[str, parsers.Parser]:
    found = parsers.parsers(tmp_path_factory.mktemp("parsers"), linear_gpt2, small_readonly)
    assert list(found) == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_damaged_is_refused(known, name):
    parser = known[name]
    parser.read(parser.sample)

    @settings(max_examples=30, suppress_health_check=list[Any](HealthCheck))
    @given(parsers.edits())
    def tried(edits: list[parsers.Edit]) -> None:
        assert parsers.problem(parser, parsers.damaged(parser.sample, edits)) is None

    tried()

"""A server in the middle that changes answers, of circuits and of linear layers: they are taken, or refused by the
project's own errors, and nothing else happens. So are damaged ciphertexts of the engines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import parsers
import tampering

FEW = settings(max_examples=20, suppress_health_check=list[Any](HealthCheck))


@FEW
@given(change=tampering.changes())
def test_circuits(change):
    assert tampering.outcome_of_circuits(change)[1] is None


@FEW
@given(change=tampering.changes())
def test_linear_layers(linear_gpt2, change):
    assert tampering.outcome_of_linear_layers(linear_gpt2, change)[1] is None


@pytest.mark.parametrize(("backend", "library"), [("concrete", "concrete"), ("ckks", "tenseal")])
def test_ciphertexts(backend, library):
    pytest.importorskip(library)
    results = tampering.Results.of(backend)

    @FEW
    @given(parsers.edits())
    def damaged(edits: list[parsers.Edit]) -> None:
        assert results.outcome(edits)[1] is None

    damaged()

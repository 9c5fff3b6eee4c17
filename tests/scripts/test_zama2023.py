"""What "Towards Encrypted Large Language Models with FHE" claims and this repository promises to reproduce."""

import pytest

pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
import zama2023


@pytest.mark.slow
def test_the_baseline_has_a_lookup_for_every_step_of_the_publication():
    """GPT-2's shape, 6 tokens, 4 bits, one head: compiled, not run. The publication counts 5.6% more, and not which."""
    encrypted = zama2023.compile_baseline(
        width=768, heads=12, tokens=6, bits=4, lookup_bits=6, rounding="approximate", p_error=1e-5
    )
    (circuit,) = encrypted.circuits.values()
    tokens, size = 6, 64
    pairs = tokens * tokens
    projections, products = 3 * tokens * size, 2 * 2 * pairs * size
    softmax = tokens * (tokens - 1) + pairs + tokens + 2 * pairs + pairs  # maxima, exp, reciprocals, products, weights
    assert circuit.report.pbs_count == projections + products + pairs + softmax + tokens * size == 10_968
    assert circuit.report.pbs_count == pytest.approx(zama2023.PUBLISHED_LOOKUPS, rel=0.06)
    stages = circuit.report.pbs_by_stage
    assert sum(count for widths in stages.values() for count in widths.values()) == circuit.report.pbs_count
    assert {"query", "key", "value", "scores", "softmax", "output"} <= stages.keys()

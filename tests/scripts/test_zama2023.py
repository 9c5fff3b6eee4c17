"""What the post claims and this repository promises to reproduce."""

import pytest

pytest.importorskip("concrete.fhe", reason="the fhe extra is not installed")
import the_post


def test_the_yardstick_has_the_posts_number_of_lookups():
    """GPT-2's shape, 6 tokens, 4 bits, one head: compiled, not run."""
    encrypted = the_post.compile_yardstick(
        width=768, heads=12, tokens=6, bits=4, rounding_threshold_bits=6, rounding="approximate", p_error=1e-5
    )
    (circuit,) = encrypted.circuits.values()
    assert circuit.report.pbs_count == pytest.approx(the_post.POST_LOOKUPS, rel=0.05)
    stages = circuit.report.pbs_by_stage
    assert sum(count for widths in stages.values() for count in widths.values()) == circuit.report.pbs_count
    assert {"query", "key", "value", "scores", "softmax", "output"} <= stages.keys()

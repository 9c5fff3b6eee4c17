"""Figures of a sweep, from a small table made by hand."""

import numpy as np
import pandas as pd
import pytest

from jaxgpt2.sweeps import plots


def row(method: str, bits: int, recovered: float, rank: int | None = None, head: int | None = 0) -> dict:
    return {
        "model": "tiny", "layer": 0, "head": head, "attention": method, "input_bits": bits, "weight_bits": bits,
        "activation_bits": bits, "rounding_threshold_bits": 6, "score_rank": rank, "top_1": 0.9, "top_1_ablated": 0.5,
        "recovered_kl": recovered, "seq_len": 6, "machine": "a machine", "estimated_seconds_per_token": 2.0 * bits,
        "error": None,
    }  # fmt: skip


@pytest.fixture
def frame():
    rows = [row("softmax", bits, -3 + bits / 2) for bits in (3, 4, 6)]
    rows += [row("lowrank", bits, 1 - rank / 100, rank) for bits in (3, 4, 6) for rank in (4, 8)]
    return pd.DataFrame(rows).convert_dtypes()


def test_bits_are_integers_on_the_axis(frame):
    figure = plots.over_bits(frame)
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [3, 4, 5, 6]


def test_a_method_that_has_the_same_bits_always_is_a_line_across(frame):
    always = pd.DataFrame([row("polynomial", 12, 1.0)])
    axes = plots.over_bits(pd.concat([frame, always]).convert_dtypes()).axes[1]
    (line,) = [line for line in axes.lines if line.get_label() == "polynomial"]
    assert np.asarray(line.get_xdata()).tolist() == [0, 1]  # of the axes' width
    assert axes.get_xlim()[1] < 7


def test_options_tell_curves_apart_wherever_their_columns_stand(frame):
    moved = frame[[name for name in frame.columns if name != "score_rank"] + ["score_rank"]]
    labels = [[line.get_label() for line in plots.over_bits(rows).axes[0].lines] for rows in (frame, moved)]
    assert labels[0] == labels[1] and {"lowrank, score rank 4", "lowrank, score rank 8"} < set(labels[0])


def test_every_method_has_rows_of_its_own_on_the_map_of_heads(frame):
    figure = plots.over_heads(frame)
    maps = [axes for axes in figure.axes if axes.get_title()]
    heights = {axes.get_title().split(",")[0]: axes.get_position().y0 for axes in maps}
    assert len(maps) == 6 and len(set(heights.values())) == 2


def test_a_method_has_one_colour_in_every_figure(frame):
    colours = {str(line.get_label()).split(",")[0]: line.get_color() for line in plots.over_bits(frame).axes[0].lines}
    assert colours["lowrank"] == plots.LOOKS["lowrank"][0]
    assert colours["softmax"] == plots.LOOKS["softmax"][0]


def test_methods_that_it_does_not_know_get_colours_of_their_own():
    look = plots.looks(["mine", "lowrank", "another"])
    assert len({colour for colour, _ in look.values()}) == len(look)
    assert look["lowrank"] == plots.LOOKS["lowrank"]


def test_a_label_names_the_options_that_differ_and_no_others(frame):
    labels = [line.get_label() for line in plots.over_bits(frame).axes[0].lines]
    assert labels == ["lowrank, score rank 4", "lowrank, score rank 8", "softmax", "without the head"]


def test_no_head_and_float_are_always_on_the_axis_of_recovered_kl(frame):
    low, high = plots.over_cost(frame[frame["attention"] == "lowrank"]).axes[0].get_ylim()
    assert low < 0 < 1 < high
    assert plots.over_cost(frame).axes[0].get_ylim()[0] == pytest.approx(-1.05)


def test_the_legend_covers_no_curve(frame):
    for figure in (plots.over_bits(frame), plots.over_cost(frame)):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_same_table_gives_the_same_file(frame, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert plots.draw(frame, tmp_path / name, "svg") == ["over_bits.svg", "over_cost.svg", "over_heads.svg"]
    assert (tmp_path / "a" / "over_bits.svg").read_bytes() == (tmp_path / "b" / "over_bits.svg").read_bytes()

"""What other machines would take, from published times."""

from pathlib import Path

import pytest

import forecast_table
from jaxgpt2.forecast import PUBLISHED, Machine, forecast, forecasts, machines

SOME = Machine("some", "lookup", {2: 1.0, 4: 10.0}, "2026", "a page")


def test_a_lookup_takes_the_time_of_the_narrowest_width_that_holds_it():
    assert forecast({1: 1000, 2: 1000, 3: 100, 4: 100}, SOME).seconds == pytest.approx(1 + 1 + 1 + 1)
    assert forecast({}, SOME).seconds == 0


def test_lookups_that_a_compiler_merged_count_less():
    assert forecast({0: -10, 2: 100}, SOME).seconds == pytest.approx(0.09)


def test_a_machine_without_a_width_has_no_time_and_says_so():
    found = forecast({4: 1, 5: 1}, SOME)
    assert found.seconds is None
    assert found.describe() == f"{PUBLISHED}: no time of lookups of 5 bits on some"


def test_every_line_says_that_it_was_published_and_not_measured():
    for found in forecasts({4: 10, 6: 10}):
        assert PUBLISHED in found.describe()
        assert found.to_json()["note"] == PUBLISHED


def test_every_machine_names_its_source_and_what_was_timed():
    for machine in machines():
        assert all((machine.machine, machine.operation, machine.milliseconds, machine.year, machine.source))


def test_the_published_figure_of_the_hpu_is_its_throughput():
    (hpu,) = (machine for machine in machines() if "HPU" in machine.machine)
    assert forecast({4: 14167}, hpu).seconds == pytest.approx(1, abs=1e-3)


def test_the_page_shows_the_table_that_the_script_prints():
    page = Path(__file__).parents[1] / "docs" / "forecast.md"
    assert forecast_table.table_of_forecasts() in page.read_text()

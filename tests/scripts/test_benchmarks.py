"""The page of benchmarks is written by running the commands that it names."""

from click.testing import CliRunner

import benchmarks

PAGE = """# Figures

<!-- echo one -->

old

<!-- end -->

Words.

<!-- printf '| a |\\n| --- |\\n| 1 |\\n' -->
<!-- end -->

<!-- exit 3 -->
kept
<!-- end -->
"""


def test_what_commands_print_replaces_what_they_printed_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    ran = CliRunner().invoke(benchmarks.main, ["--page", str(page)])
    assert ran.exit_code == 1 and "exit 3: exit status 3" in ran.output
    text = page.read_text()
    assert "<!-- echo one -->\n\n    echo one\n\n```\none\n```\n\n<!-- end -->" in text and "old" not in text
    assert " -->\n\n    printf '| a |\\n| --- |\\n| 1 |\\n'\n\n| a |\n| --- |\n| 1 |\n\n<!-- end -->" in text
    assert "\nWords.\n" in text and "\nkept\n" in text
    assert CliRunner().invoke(benchmarks.main, ["--page", str(page), "--only", "nothing"]).exit_code == 2


def test_the_page_names_commands():
    ran = CliRunner().invoke(benchmarks.main, ["--list"])
    assert ran.exit_code == 0 and "scripts/bench_sweep.py" in ran.output

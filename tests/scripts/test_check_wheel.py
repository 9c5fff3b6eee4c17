"""The wheel works with each extra alone."""

import tomllib

import pytest
from click.testing import CliRunner

import check_wheel


def test_every_extra_that_users_install_has_a_command_that_uses_it():
    project = tomllib.loads((check_wheel.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(check_wheel.USES) - {"core"} == set(project["optional-dependencies"]) - {"dev", "docs"}


@pytest.mark.slow
def test_the_wheel_works_without_extras_and_says_what_it_lacks():
    done = CliRunner().invoke(check_wheel.main, ["core"], catch_exceptions=False)
    assert done.exit_code == 0, done.output

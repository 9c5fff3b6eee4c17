"""The script that tries the wheel knows every extra."""

import tomllib

import check_wheel


def test_every_extra_that_users_install_has_a_command_that_uses_it():
    project = tomllib.loads((check_wheel.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(check_wheel.USES) - {"core"} == set(project["optional-dependencies"]) - {"dev"}

"""What the files around the code say of it is so."""

import tomllib
from pathlib import Path

import yaml

import jaxgpt2

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == jaxgpt2.__version__
    assert f"{jaxgpt2.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_in_the_navigation_of_the_site():
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in sorted(pages) if f": {page}\n" not in navigation] == []


def test_every_package_is_in_the_wheel():
    from setuptools import find_packages

    where = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = set(find_packages(str(ROOT), include=where["include"]))
    wanted = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("jaxgpt2", "fhe", "weights")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert found == wanted

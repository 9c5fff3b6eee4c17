"""What the documentation shows works."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helpers
from jaxgpt2 import methods
from jaxgpt2.encrypted import EncryptedGPT2

DOCS = Path(__file__).resolve().parents[1] / "docs"
CODE = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-method.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=["mine", "inhibitor"])
def test_the_methods_of_the_page_run_in_every_mode(code, tmp_path):
    (tmp_path / "method.py").write_text(code)
    (name,) = re.findall(r"^@attention.*\ndef (\w+)", code, re.MULTILINE)
    helpers.random_checkpoint(tmp_path, n_embd=24, n_head=3)
    passages = ["the cat", "sat on", "a mat", "one dog"]
    method = methods.named(f"{tmp_path / 'method.py'}:{name}")
    encrypted = EncryptedGPT2.from_pretrained(tmp_path, "0.1", 4, method).calibrate(passages, 5)
    encrypted = encrypted.compile(passages, 5, backend="clear")
    keys = encrypted.make_keys()
    texts = [list(encrypted.generate("cat", 2, mode, keys=keys)) for mode in ("quantized", "simulate", "encrypted")]
    assert texts[0] == texts[1] == texts[2]


ROOT = DOCS.parent
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
MARKED = re.compile(r"<!-- run -->\n```(python|sh)\n(.*?)```", re.DOTALL)


def marked(page: Path) -> list[tuple[str, str]]:
    """Language and code of the snippets of a page that are to be run: those below `<!-- run -->`."""
    return MARKED.findall(page.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if marked(page)], ids=lambda page: page.stem)
def test_the_marked_snippets_of_a_page_run_one_after_the_other(page, tmp_path):
    """Python snippets that follow each other are one program; shell snippets find the repository's directories."""
    for name in ("weights", "scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for language, group in itertools.groupby(marked(page), lambda snippet: snippet[0]):
        code = "\n".join(code for _, code in group)
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []

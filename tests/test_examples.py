"""What `examples/` shows works."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Nothing is kept in the user's directories, and the repository is on the path."""
    for kind in ("CACHE", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.chdir(tmp_path)


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_sweep_writes_its_table_and_figures(tmp_path):
    assert "recovered_kl" in run("sweep.py", "--out", "swept", "--passages", "8")
    assert {"rows.csv", "over_bits.png", "over_cost.png"} <= {path.name for path in (tmp_path / "swept").iterdir()}


@pytest.mark.slow
def test_the_encrypted_head_writes_what_it_writes_without_encryption():
    assert run("encrypted_head.py", "--new-tokens", "2").endswith("The same tokens as without encryption.\n")


@pytest.mark.slow
def test_the_private_model_writes_what_it_writes_without_encryption():
    lines = run("private_model.py", "--new-tokens", "8").splitlines()
    texts = [lines[i + 1] for i, line in enumerate(lines) if line.startswith("$ jaxgpt2 generate")]
    assert len(texts) == 2
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_notebook_runs_and_was_executed(tmp_path):
    """A cell that raises fails the test; what is stored came out of the same cells, and nothing of it is an error's."""
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)

    def kinds() -> list[set[tuple[str, str]]]:
        # A stream comes in as many pieces as it likes.
        return [
            {(each.output_type, each.get("name", "")) for each in cell.get("outputs", ())} for cell in notebook.cells
        ]

    stored = kinds()
    assert any(stored) and ("stream", "stderr") not in set().union(*stored)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds() == stored

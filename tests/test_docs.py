"""What the documentation shows works."""

import importlib
import re
from pathlib import Path

import helpers
from jaxgpt2.encrypted import EncryptedGPT2
from jaxgpt2.methods import method

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_method_of_the_tutorial_runs_in_every_mode(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-method.md").read_text(), re.DOTALL)
    (tmp_path / "inhibitor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("inhibitor")
    try:
        helpers.random_checkpoint(tmp_path, n_embd=24, n_head=3)
        passages = ["the cat", "sat on", "a mat", "one dog"]
        encrypted = EncryptedGPT2.from_pretrained(tmp_path, "0.1", 4, "inhibitor").calibrate(passages, 5)
        encrypted = encrypted.compile(passages, 5, backend="clear")
        texts = [list(encrypted.generate("cat", 2, mode, keys=encrypted.make_keys())) for mode in
                 ("quantized", "simulate", "encrypted")]  # fmt: skip
        assert texts[0] == texts[1] == texts[2]
    finally:
        method._METHODS.pop("inhibitor")

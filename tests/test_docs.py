"""What the documentation shows works."""

import re
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

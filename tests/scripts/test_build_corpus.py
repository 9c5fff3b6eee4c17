"""Tests of the corpus builder's pure functions, on small inputs and without a network."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lxml")

import build_corpus as bc

PROSE = "The key that opens the box is kept by the person who sent it, and nobody else may use it before noon."
OTHER = "When the rain had stopped, they walked down to the river and waited there for the boat that was late."
PAGE = f"""<html><head><title>A title which is long enough to be taken for a sentence of the text.</title></head><body>
<div class="sphinxsidebar"><p>{PROSE.replace("key", "sidebar")}</p></div>
<nav><p>{PROSE.replace("key", "navigation")}</p></nav>
<p>{PROSE.replace("key", "<code>key</code>")}</p>
<table><tr><td>{PROSE.replace("key", "table")}</td></tr></table>
<pre>{PROSE.replace("key", "listing")}</pre>
<div class="highlight"><p>{PROSE.replace("key", "highlight")}</p></div>
<ul><li>Home</li><li>{OTHER}</li></ul>
<div class="footer"><p>{PROSE.replace("key", "footer")}</p></div></body></html>"""


def document(package: str, number: int, *paragraphs: str) -> bc.Document:
    return bc.Document(package, f"/file{number}", list(paragraphs))


def unique(number: int) -> str:
    """Three hundred letters of text that no other number gives."""
    word = "".join(chr(97 + int(digit)) for digit in str(number))
    return " ".join(f"{word} {chr(97 + i % 26)}{word} walked home" for i in range(20)) + "."


def test_html_keeps_prose_and_drops_code_tables_and_navigation() -> None:
    (found,) = bc.read_file("p", "/a.html", PAGE.encode())
    assert found.paragraphs == [PROSE, OTHER]


def test_a_sentence_cut_by_a_listing_is_dropped() -> None:
    page = f"<body><p>{PROSE[:70]}<pre>x = 1</pre> and so on.</p><p>{OTHER}</p></body>"
    (found,) = bc.read_file("p", "/a.html", page.encode())
    assert found.paragraphs == [OTHER]


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be kept.",
        PROSE[:-1],  # no full stop
        PROSE.replace("key", "self._key_of[x] = {y: z}; a|b == c"),
        "Der Schluessel zu der Kiste liegt bei dem Absender, und niemand sonst darf ihn vor Mittag benutzen.",
        "Copyright 2020 by the authors. " + PROSE,
        PROSE + " See https://example.org for the rest of it.",
        "Alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lambda, mu, nu, xi, omicron, pi.",
    ],
)
def test_what_is_not_prose_is_dropped(text: str) -> None:
    assert bc.clean([text, PROSE]) == [PROSE]


def test_normalise_makes_quotes_and_spaces_plain() -> None:
    assert bc.normalise("\u201cIt\u2019s\u00a0\ufb01ne\u201d\n  she   said .") == '"It\'s fine" she said.'


def test_plain_text_drops_indented_and_columned_blocks() -> None:
    text = f"{PROSE}\n\n        {OTHER}\n\nname      value     {OTHER}\n"
    assert bc.clean(bc.text_blocks(text)) == [PROSE]


def test_pod_loses_its_markup_and_code() -> None:
    pod = f"=head1 NAME\n\n{PROSE.replace('key', 'B<key>')}\n\n    {OTHER}\n"
    assert bc.clean(bc.pod_blocks(pod)) == [PROSE]


def test_game_files_give_only_their_story() -> None:
    assert bc.clean(bc.game_blocks(f'id=x\nmessage= _ "{PROSE}"\n')) == [PROSE]
    assert bc.clean(bc.game_blocks(f'mission "x"\n\tconversation\n\t\t`{OTHER}`\n')) == [OTHER]


def test_mallard_page_is_read() -> None:
    page = f'<page xmlns="http://projectmallard.org/1.0/"><info><desc>{OTHER}</desc></info><p>{PROSE}</p></page>'
    (found,) = bc.read_file("p", "/a.page", page.encode())
    assert found.paragraphs == [PROSE]


def test_dictionary_senses_begin_with_the_headword() -> None:
    text = "cryptography\n    n 1: the act of writing in code or cipher so that it may be read by\n         no one else"
    text += " [syn: {coding}]\n    2: short\n"
    (found,) = bc.read_file("dict-wn", "/wn.dict.dz", gzip.compress(text.encode()))
    sense = "Cryptography: the act of writing in code or cipher so that it may be read by no one else."
    assert found.paragraphs == [sense]


def test_deduplicate_drops_equal_and_nearly_equal_paragraphs_everywhere() -> None:
    first, near = unique(1), unique(1).replace("home", "away", 12)
    kept = list(bc.deduplicate([document("a", 1, first), document("b", 1, near, unique(2)), document("c", 1, first)]))
    assert [(d.package, d.paragraphs) for d in kept] == [("a", [first]), ("b", [unique(2)])]


def test_deduplicate_drops_documents_left_too_short() -> None:
    assert list(bc.deduplicate([document("a", 1, PROSE)])) == []


def test_split_depends_on_the_documents_identity_alone() -> None:
    documents = [document("a", i, unique(i)) for i in range(4000)]
    splits = [bc.split_of(d) for d in documents]
    assert splits == [bc.split_of(document("a", i, "Changed text.")) for i in range(4000)]
    assert 0.95 < splits.count("train") / 4000 < 0.99
    assert set(splits) == set(bc.SPLITS)


def test_no_package_exceeds_its_share() -> None:
    documents = [document("big", i, unique(i)) for i in range(500)]
    documents += [document(f"p{n}", i, unique(i)) for n in range(20) for i in range(20)]
    kept = bc.cap_packages(documents)
    total = sum(d.size for d in kept)
    assert sum(d.size for d in kept if d.package == "big") <= 1.01 * bc.CAP * total
    assert sum(d.package != "big" for d in kept) == 400


def test_manifest_sums_and_names_no_host_or_path() -> None:
    documents = [document(name, i, unique(i)) for name in ("a", "b") for i in range(300)]
    texts = {name: "\n".join(d.text for d in documents if bc.split_of(d) == name) for name in bc.SPLITS}
    packages = [bc.PackageResult(name, "1.0-1", "ab" * 32, "GPL-2") for name in ("a", "b")]
    facts: dict[str, Any] = bc.manifest_of(packages, documents, texts)
    rows, totals, splits = facts["packages"], facts["totals"], facts["splits"]
    assert sum(row["bytes"] for row in rows) == totals["bytes_of_prose"] == sum(d.size for d in documents)
    assert sum(row["documents"] for row in rows) == sum(s["documents"] for s in splits.values()) == 600
    assert splits["train"]["sha256"] == hashlib.sha256(texts["train"].encode()).hexdigest()
    assert set(rows[0]) == {"name", "version", "licence", "documents", "bytes", "deb_sha256"}


def test_licences_are_read_from_the_copyright_file() -> None:
    assert bc.licence_names("License: MIT\n x\nLicense: MIT\nLicense: GPL-2+\n") == "MIT, GPL-2+"
    assert bc.licence_names("see /usr/share/common-licenses/GFDL-1.2.") == "GFDL-1.2"


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    status = bc.main(["--out", str(blocked / "out"), "--cache", str(tmp_path / "c"), "--manifest", str(tmp_path / "m")])
    assert status == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_too_little_prose_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bc, "fetch", lambda names, cache: [])
    assert bc.main(["--out", str(tmp_path), "--cache", str(tmp_path / "c"), "--manifest", str(tmp_path / "m")]) == 2
    assert "fewer than the 40 MB" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.txt")) and not (tmp_path / "m").exists()

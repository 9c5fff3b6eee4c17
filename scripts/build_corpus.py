"""Build a corpus of English prose from the Debian archive, split by document.

The documentation, dictionaries and game stories in Debian's main section are freely licensed, versioned and
checksummed, so anyone with apt can rebuild the same corpus and nobody has to trust a scraped data set.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import chain
from multiprocessing import Pool
from pathlib import Path

from lxml import etree, html  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from weights.checkpoint import write_text_atomically

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "calibration", "evaluation")
MIN_DOCUMENT = 300
CAP, DICTIONARY_CAP = 0.12, 0.08  # the largest share of the corpus that one package may hold
ENTRIES_PER_DOCUMENT = 50


def words_of(text: str) -> list[str]:
    """Spare long word lists their quotes and commas."""
    return text.split()


# Package name -> which of its files to read (searched in the path inside the package).
SOURCES: dict[str, str] = {
    "anarchism": r"/html/.*\.html$",
    "apache2-doc": r"/manual/en/.*\.html$",
    "aptitude-doc-en": r"/html/en/.*\.html$",
    "bind9-doc": r"/arm/.*\.html$",
    "borgbackup-doc": r"/html/(?!changes|genindex|_modules).*\.html$",
    "crawl-common": r"/dat/(descript|database)/[^/]+\.txt$",
    "debian-edu-doc-en": r"\.html$",
    "debian-faq": r"\.en\.html$",
    "debian-handbook": r"/html/en-US/.*\.html$",
    "debian-history": r"/[a-z-]+\.en\.html$",
    "debian-kernel-handbook": r"\.html$",
    "debian-policy": r"policy\.html/.*\.html$",
    "debian-reference-en": r"\.en\.html$",
    "developers-reference": r"developers-reference/[^/]+\.html$",
    "dict-devil": r"\.dict\.dz$",
    "dict-foldoc": r"\.dict\.dz$",
    "dict-gcide": r"\.dict\.dz$",
    "dict-jargon": r"\.dict\.dz$",
    "dict-wn": r"\.dict\.dz$",
    "endless-sky-data": r"/data/.*\.txt$",
    "exim4-doc-html": r"/spec_html/.*\.html$",
    "fortunes": r"/games/fortunes/[a-z-]+$",
    "freedombox-doc-en": r"/en/.*\.part\.html$",
    "gimp-help-en": r"/help/en/.*\.html$",
    "git-annex": r"/doc/git-annex/html/.*\.html$",
    "git-doc": r"/git-doc/(?!RelNotes).*\.html$",
    "gnome-user-docs": r"/help/C/.*\.page$",
    "gnucash-docs": r"/gnucash-(guide|help)-en/.*\.html$",
    "gnupg": r"\.info(-\d)?\.gz$",
    "gnutls-doc": r"/gnutls.*\.(html|info.*)$",
    "harden-doc": r"/html/en-US/.*\.html$",
    "ikiwiki": r"/html/(?!news).*\.html$",
    "installation-guide-amd64": r"-amd64/en/.*\.html$",
    "keepassxc": r"\.html$",
    "kicad-doc-en": r"/help/en/.*\.html$",
    "kleopatra": r"/HTML/en/.*\.docbook(\.bz2)?$",
    "krb5-doc": r"/krb5-doc/(?!appdev/refs).*\.html$",
    "kstars-data": r"/HTML/en/kstars/.*\.docbook$",
    "libboost1.74-doc": r"/(doc/html|libs)/.*\.html?$",
    "libgcrypt20-doc": r"\.html$",
    "libreoffice-help-en-us": r"/en-US/text/.*\.html$",
    "lilypond-doc": r"/info/lilypond-(learning|notation|usage|essay|contributor).*\.info(-\d)?\.gz$",
    "linux-doc-6.1": r"/html/(?!translations).*\.html$",
    "live-manual-html": r"live-manual\.en\.html$",
    "llvm-14-doc": r"/html/(?!doxygen|CommandGuide).*\.html$",
    "maxima-doc": r"/html/maxima_\d+\.html$",
    "mercurial-common": r"/helptext/.*\.txt$",
    "miscfiles": r"/(misc|dict|doc)/.*",
    "neutron-doc": r"/html/(?!reference).*\.html$",
    "nova-doc": r"/html/(?!reference).*\.html$",
    "octave-doc": r"/octave\.html/.*\.html$",
    "perl-doc": r"/perl[^/]*(?<!delta)\.pod$",
    "postfix-doc": r"/html/.*\.html$",
    "postgresql-doc-15": r"/html/(?!release).*\.html$",
    "python-astropy-doc": r"/html/(?!api/|whatsnew|changelog|_modules|generated).*\.html$",
    "python-cryptography-doc": r"/html/.*\.html$",
    "python-django-doc": r"/html/.*\.html$",
    "python-pandas-doc": r"/html/(development|getting_started|user_guide)/.*\.html$",
    "python-scipy-doc": r"/html/(tutorial|dev)/.*\.html$",
    "python-sklearn-doc": r"/html/(modules/[^/]+|tutorial/.*|developers/.*|faq|common_pitfalls)\.html$",
    "python3.11-doc": r"/html/(?!whatsnew/changelog|genindex).*\.html$",
    "r-doc-html": r"/manual/.*\.html$",
    "racket-doc": r"/racket/.*\.html$",
    "rust-doc": r"/html/(?!std|core|alloc|proc_macro|test|src|error_codes|nightly-rustc).*\.html$",
    "seahorse": r"/help/C/.*\.page$",
    "shorewall-doc": r"/html/.*\.html$",
    "slurm-wlm-doc": r"/html/.*\.html$",
    "sphinx-doc": r"/html/(?!_modules|changes|genindex).*\.html$",
    "sqlite3-doc": r"/sqlite3?/(?!releaselog|changes).*\.html$",
    "twisted-doc": r"/html/(?!api).*\.html$",
    "wireshark-doc": r"/wsug_html_chunked/.*\.html$",
    "zsh-doc": r"/html/.*\.html$",
    "wesnoth-1.16-data": r"/data/(campaigns|core|multiplayer)/.*\.cfg$|/manual\.en\.html$",
} | {
    f"wesnoth-1.16-{name}": r"/campaigns/.*\.cfg$"
    for name in words_of("did dm ei httt l low nr sof sota sotbe thot trow tsg utbs")
}

BLOCK_TAGS = set(
    words_of(
        "address article blockquote body br center dd div dl dt fieldset figcaption figure form h1 h2 h3 h4 h5 h6 "
        "html hr item li main ol p para section simpara td th title tr ul listitem term page note steps list "
        "chapter sect1 sect2 sect3 sect4 formalpara"
    )
)
DROPPED_TAGS = set(
    words_of(
        "script style pre table nav header footer aside head button select form noscript svg math sup textarea "
        "programlisting screen literallayout synopsis informaltable bookinfo articleinfo info code-block credit "
        "legalnotice revhistory indexterm remark"
    )
)
DROPPED_CLASSES = set(
    words_of(
        "sphinxsidebar related footer navheader navfooter navigation toc tocset navsettop navsetbottom contents "
        "toctree-wrapper headerlink highlight literal-block programlisting screen synopsis index indextable copyright "
        "legalnotice revhistory breadcrumbs breadcrumb sidebar sidebar-wrapper page_header nav-wrapper "
        "mobile-nav-chapters admonition-todo math MathJax versionmodified field-list SIntrapara-code verbatim "
        "example smallexample "
        "display lisp versionlabel refcontent pageheader pagefooter bottomnav topnav parentlinks backlinks "
        "releaseinfo refsynopsisdiv funcsynopsis titlepage bibliography"
    )
)
STOP_WORDS = set(
    words_of(
        "the of and a to in is you that it he was for on are as with his they i at be this have from or one had by "
        "but not what all were we when your can there an which their if will each how then them these so some her "
        "would him into has more no my do me our she may who any its been than only other such also about out up "
        "used where must should does because just very most could over after before through being between those"
    )
)
BOILERPLATE = re.compile(
    r"copyright|licen[cs]ed under|permission is (hereby )?granted|all rights reserved|without (any )?warranty|"
    r"free documentation license|general public license|creative commons|published by the free software|"
    r"https?:|www\.|ftp:|this (page|document) was (last|generated)|table of contents|ISBN|last (updated|modified)|"
    r"deprecated since|new in version|changed in version|click here|javascript",
    re.IGNORECASE,
)
PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
     "\u00ab": '"', "\u00bb": '"', "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": " - ",
     "\u2015": " - ", "\u2212": "-", "\u00ad": "", "\u200b": "", "\ufeff": "", "\u00b6": "", "\u2032": "'",
     "\u2033": '"', "\u200e": "", "\u00b4": "'"}
)  # fmt: skip


class CorpusError(Exception):
    """A reason the corpus cannot be built, told to the user in one line."""


@dataclass
class Document:
    """One source file (or fifty dictionary entries); the unit that goes whole into one split."""

    package: str
    path: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass
class PackageResult:
    """What one package gave, with what the manifest says of where it came from."""

    name: str
    version: str
    sha256: str
    licence: str
    documents: list[Document] = field(default_factory=list)


def normalise(text: str) -> str:
    """Give one plain form to quotes, dashes and white space, so that equal sentences compare equal."""
    text = unicodedata.normalize("NFKC", text.translate(PLAIN)).translate(PLAIN)
    text = re.sub(r"``|''", '"', text)
    text = re.sub(r"\s+", " ", text).strip(" *")
    return re.sub(r" ([,.;:!?)])(?=\s|$)", r"\1", text)


def is_prose(text: str) -> bool:
    """Tell a paragraph a person wrote to be read from code, lists, menus, other languages and legal text."""
    if not 60 <= len(text) <= 4000 or not re.search(r"[.!?][\"')\]]*$", text) or not re.match(r"[A-Z\"'(]", text):
        return False
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 10 or max(map(len, text.split())) > 32 or BOILERPLATE.search(text):
        return False
    letters = sum(map(len, words))
    odd = len(re.findall(r"[{}<>|\\=_^~#@$*/\[\]+%&`]", text))
    foreign = sum(ord(c) > 127 for c in text)
    code = len(re.findall(r"\w*[a-z][A-Z]\w*|\w+\(|\w_\w|[a-z]\.[a-z]|(?<!\w)--?\w|::|\b0x", text))
    common = sum(word.lower() in STOP_WORDS for word in words)
    return (
        letters >= 0.72 * len(text)
        and odd <= 0.012 * len(text)
        and foreign <= 0.02 * len(text)
        and code <= 0.06 * len(words)
        and common >= 0.22 * len(words)
    )


def clean(blocks: Iterable[str]) -> list[str]:
    """Normalise raw blocks and keep those that read as prose."""
    return [text for block in blocks if len(block) >= 60 and is_prose(text := normalise(block))]


def markup_blocks(root: etree._Element) -> list[str]:
    """Cut HTML, DocBook or Mallard into blocks of running text, passing over code, tables and navigation."""
    pieces: list[str] = []  # "\0" ends a block: also where a listing was, as half a sentence is none

    def walk(node: etree._Element) -> None:
        tag = node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""
        named = [*node.get("class", "").split(), node.get("id", ""), node.get("role", "")] if tag else []
        listing = tag == "code" and "\n" in (node.text or "")
        if not tag or tag in DROPPED_TAGS or listing or not DROPPED_CLASSES.isdisjoint(named):
            pieces.append("\0" if tag and tag != "sup" else "")
            return
        edge = "\0" if tag in BLOCK_TAGS else ""
        pieces.append(edge + (node.text or ""))
        for child in node:
            walk(child)
            pieces.append(child.tail or "")
        pieces.append(edge)

    walk(root)
    return "".join(pieces).split("\0")


def text_blocks(text: str) -> Iterator[str]:
    """Cut plain text or Info into paragraphs, passing over those laid out by hand (code, tables, verse)."""
    for block in re.split(r"\n\s*\n|\x1f", text):
        lines = block.strip("\n").split("\n")
        indents = [len(line) - len(line.lstrip()) for line in lines]
        if max(indents) <= 4 and not re.search(r"\S {3,}\S|^File: ", block, re.MULTILINE):
            text = re.sub(r"\(\*note[^)]*\)|\*[Nn]ote ([^:]+)::?", r"\1", block)
            yield re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)


def pod_blocks(text: str) -> Iterator[str]:
    """Cut Perl's POD into paragraphs; indented ones are code and '=' begins a command."""
    for block in re.split(r"\n\s*\n", text):
        if not block.startswith(("=", " ", "\t")):
            for _ in range(3):
                block = re.sub(r"[A-Z]<<? ?(?:[^<>|]*\|)?([^<>]*?) ?>?>", r"\1", block)
            yield block


def game_blocks(text: str) -> Iterator[str]:
    """Take the translatable strings of Wesnoth and the back-quoted dialogue of Endless Sky: their prose."""
    for wesnoth, sky in re.findall(r'_ *"((?:[^"]|"")*)"|`([^`\n]*)`', text):
        story = re.sub(r"<first>|<last>|<ship>", "Robin", sky) or re.sub(r"</?[a-z][^>]*>", "", wesnoth)
        yield from story.replace('""', '"').split("\n\n")


def dictionary_entries(text: str, name: str) -> Iterator[list[str]]:
    """Turn each entry of a dictd file into sentences that begin with the headword, as a glossary would."""
    body = re.sub(
        r"\[(syn|ant|also):[^\]]*\]|\[(?:\d{4} )?(?:Webster|Century)[^\]]*\]|\[(WordNet|PJC)[^\]]*\]",
        "",
        text,
    )
    for entry in re.split(r"\n(?=\S)", body):
        head, _, rest = entry.partition("\n")
        if name == "wn":
            rest = re.sub(r"\n\s+(?:[a-z]+ )?\d+: ", "\n\n", "\n" + rest)
        elif name == "gcide":
            head, _, tail = re.sub(r"\[(?:[^\[\]]|\[[^\]]*\])*\]", "", entry).partition("\\")
            rest = re.sub(r"--[A-Z][^\n]*|\([A-Z][^)]{1,20}\)", "", tail.partition("\n")[2])
            rest = re.sub(r"\n +(?:\d+\.|\([a-z]\)) ", "\n\n   ", rest)
        elif name == "devil":
            yield [entry]
            continue
        paragraphs = []
        for block in re.split(r"\n\s*\n", rest):
            if name == "gcide" and re.match(r"\n*\s{9,}", block):
                continue  # quotations, set far to the right
            block = re.sub(r"\(?\d{4}-\d\d-\d\d\)|^\s*\d+\. |\[common\]|\[[A-Z][^\]]*\]|[{}]", "", block)
            block = re.sub(r"^\s*<[^>]*> *(/[^/]*/)?", "", block).strip()
            if name in ("wn", "gcide") and len(block) > 20 and not block.startswith("Note:"):
                block = f"{head.strip().capitalize()}: {block.rstrip(' ;')}"
                block += "" if block.endswith((".", "!", "?")) else "."
            paragraphs.append(block)
        yield paragraphs


def read_file(package: str, path: str, data: bytes) -> Iterator[Document]:
    """Choose the reader a file's name calls for and give the prose in it."""
    if path.endswith((".gz", ".dz")):
        data, path = gzip.decompress(data), path[:-3]
    elif path.endswith(".bz2"):
        data, path = bz2.decompress(data), path[:-4]
    if path.endswith(".dict"):
        name = Path(path).stem
        entries = [kept for e in dictionary_entries(data.decode("utf-8", "replace"), name) if (kept := clean(e))]
        for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
            group = list(chain.from_iterable(entries[start : start + ENTRIES_PER_DOCUMENT]))
            yield Document(package, f"{path}#{start // ENTRIES_PER_DOCUMENT}", group)
        return
    blocks: Iterable[str]
    if path.endswith((".html", ".htm")):
        try:
            blocks = markup_blocks(html.document_fromstring(data, parser=html.HTMLParser(encoding="utf-8")))
        except (etree.ParserError, ValueError):
            return
    elif path.endswith((".page", ".docbook")):
        parser = etree.XMLParser(recover=True, resolve_entities=False, load_dtd=False, no_network=True)
        root = etree.fromstring(re.sub(rb"&(?!amp|lt|gt|quot|apos|#)([\w.-]+);", rb"\1", data), parser)
        blocks = markup_blocks(root) if root is not None else []
    else:
        text = data.decode("utf-8", "replace")
        if "/fortunes/" in path:
            blocks = text_blocks(text.replace("\n%\n", "\n\n"))
        elif path.endswith(".pod"):
            blocks = pod_blocks(text)
        elif path.endswith(".cfg") or "endless-sky" in path:
            blocks = game_blocks(text)
        else:
            blocks = text_blocks(text)
    yield Document(package, path, clean(blocks))


def licence_names(copyright_text: str) -> str:
    """Name the licences a package's copyright file states, commonest first, at most four."""
    names = re.findall(r"^License: *(\S[^\n]{0,40})$", copyright_text, re.MULTILINE)
    names = names or re.findall(r"/common-licenses/([A-Za-z]+-?[\d.]*\d|[A-Za-z]+)", copyright_text)
    names = names or re.findall(r"\b(GFDL|L?GPL|Artistic|Apache|BSD|MIT|[Pp]ublic [Dd]omain)\b", copyright_text)
    ordered = sorted(set(names), key=lambda n: (-names.count(n), n))
    return ", ".join(ordered[:4]) or "see the package's copyright file"


def read_package(job: tuple[str, str, Path]) -> PackageResult:
    """Read one .deb straight from its tar stream: nothing is installed or unpacked on disk."""
    name, version, deb = job
    wanted = re.compile(SOURCES[name])
    result = PackageResult(name, version, hashlib.sha256(deb.read_bytes()).hexdigest(), licence_names(""))
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            path = member.name.lstrip(".")
            content = tar.extractfile(member) if member.isreg() else None
            if content and path.endswith(f"/doc/{name}/copyright"):
                result.licence = licence_names(content.read().decode("utf-8", "replace"))
            elif content and wanted.search(path):
                result.documents += read_file(name, path, content.read())
    result.documents.sort(key=lambda d: d.path)
    return result


def fingerprints(paragraph: str) -> tuple[int, int]:
    """Hash the first and the last ten words: template texts that differ only in the middle share one of them."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    if ": " in paragraph[:40] and len(words) > 14:  # one definition may stand under two headwords
        words = re.findall(r"[a-z]+", paragraph.partition(": ")[2].lower()) or words
    digests = (hashlib.blake2b(" ".join(part).encode(), digest_size=8).digest() for part in (words[:10], words[-10:]))
    first, last = (int.from_bytes(digest, "big") for digest in digests)
    return first, last ^ 1


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Keep the first of equal or nearly equal paragraphs anywhere, so that no split repeats another."""
    seen: set[int] = set()
    for document in documents:
        kept = []
        for paragraph in document.paragraphs:
            prints = fingerprints(paragraph)
            if seen.isdisjoint(prints):
                kept.append(paragraph)
            seen.update(prints)
        if sum(map(len, kept)) >= MIN_DOCUMENT:
            yield Document(document.package, document.path, kept)


def identity(document: Document) -> int:
    """A number fixed by package and path alone: it decides the split and the order in it on every machine."""
    return int.from_bytes(hashlib.sha256(f"{document.package}{document.path}".encode()).digest()[:8], "big")


def split_of(document: Document) -> str:
    """97 % train, 1 % calibration, 2 % evaluation."""
    slot = identity(document) % 100
    return "train" if slot < 97 else "calibration" if slot < 98 else "evaluation"


def cap_packages(documents: list[Document]) -> list[Document]:
    """Leave documents out of the largest packages, so that none speaks for more than its share."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.package] = sizes.get(document.package, 0) + document.size
    share = {name: DICTIONARY_CAP if name.startswith("dict-") else CAP for name in sizes}
    if sum(share.values()) <= 1:
        return documents  # too few packages for any cap to hold
    total = float(sum(sizes.values()))
    for _ in range(60):
        total = sum(min(size, share[name] * total) for name, size in sizes.items())
    kept, used = [], dict.fromkeys(sizes, 0)
    for document in sorted(documents, key=identity):
        if used[document.package] + document.size <= share[document.package] * total:
            used[document.package] += document.size
            kept.append(document)
    return kept


def manifest_of(packages: list[PackageResult], documents: list[Document], texts: dict[str, str]) -> dict[str, object]:
    """State what went in and what came out, so that a rebuilt corpus can be compared byte for byte."""
    rows = []
    for package in packages:
        own = [d for d in documents if d.package == package.name]
        rows.append({"name": package.name, "version": package.version, "licence": package.licence,
                     "documents": len(own), "bytes": sum(d.size for d in own),
                     "deb_sha256": package.sha256})  # fmt: skip
    splits = {
        name: {"documents": sum(split_of(d) == name for d in documents), "bytes": len(text.encode()),
               "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in texts.items()
    }  # fmt: skip
    totals = {"documents": len(documents), "bytes_of_prose": sum(d.size for d in documents)}
    return {"date": date.today().isoformat(), "packages": rows, "totals": totals, "splits": splits}


def fetch(names: list[str], cache: Path) -> list[tuple[str, str, Path]]:
    """Download the packages that are not in the cache yet and say which file holds which version."""
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []

    def apt(arguments: list[str], where: Path) -> str:
        command = ["apt-get", "download", *options, *arguments]
        done = subprocess.run(command, cwd=where, text=True, capture_output=True, check=False)
        if done.returncode:
            errors = [line[3:] for line in done.stderr.splitlines() if line.startswith("E: ")] or ["apt-get failed"]
            raise CorpusError(f"cannot get the packages (did you run apt-get update?): {errors[0]}")
        return done.stdout

    jobs, missing = {}, []
    with tempfile.TemporaryDirectory() as empty:  # apt lists only what the directory lacks
        listing = apt(["--print-uris", *names], Path(empty))
    for file, size in re.findall(r"^'[^']*' (\S+) (\d+)", listing, re.MULTILINE):
        name, version, _ = file.split("_")
        jobs[name] = (name, version.replace("%3a", ":"), cache / file)
        if not (cache / file).exists() or (cache / file).stat().st_size != int(size):
            missing.append(name)
    if missing:
        apt(missing, cache)
    return [jobs[name] for name in names]


def build(out: Path, manifest: Path, cache: Path, min_megabytes: float, workers: int) -> dict[str, object]:
    """Fetch, read, deduplicate, cap, split; nothing is written before the whole corpus is known to be good."""
    try:
        for directory in (out, cache, manifest.parent):
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise CorpusError(f"cannot write to {error.filename or out}: {error.strerror}") from error
    try:
        jobs = fetch(sorted(SOURCES), cache)
    except FileNotFoundError as error:
        raise CorpusError("apt-get is missing: this needs Debian or a relative of it") from error
    jobs.sort(key=lambda job: -job[2].stat().st_size)
    with Pool(workers) as pool:
        results = pool.imap_unordered(read_package, jobs)
        packages = sorted(tqdm(results, total=len(jobs), unit="package", file=sys.stderr), key=lambda p: p.name)
    documents = cap_packages(list(deduplicate(d for package in packages for d in package.documents)))
    total = sum(document.size for document in documents)
    if total < min_megabytes * 1e6:
        raise CorpusError(f"only {total / 1e6:.1f} MB of prose, fewer than the {min_megabytes:g} MB asked for")
    documents.sort(key=identity)
    joiner = f"\n{SEPARATOR}\n"
    texts = {name: joiner.join(d.text for d in documents if split_of(d) == name) + "\n" for name in SPLITS}
    facts = manifest_of(packages, documents, texts)
    for name, text in texts.items():
        write_text_atomically(out / f"{name}.txt", text)
    write_text_atomically(manifest, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description="Build a corpus of English prose from free documentation in the Debian archive.",
        epilog="Run apt-get update first: the packages are looked up in apt's lists. Nothing is installed.",
    )
    here = Path(__file__).resolve().parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgpt2-debs"
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="directory to write to (%(default)s)")
    parser.add_argument("--manifest", type=Path, default=here / "corpus_manifest.json", help="where to write it")
    parser.add_argument("--cache", type=Path, default=cache, help="directory for downloaded packages")
    parser.add_argument("--min-megabytes", type=float, default=40, help="refuse a smaller corpus (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read packages (%(default)s)")
    args = parser.parse_args(argv)
    try:
        facts = build(args.out, args.manifest, args.cache, args.min_megabytes, args.workers)
    except (CorpusError, OSError, tarfile.TarError) as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts["splits"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page in a browser, on a real server: what a person sees, with the keyboard alone, and the picture of the docs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import served
from jaxgpt2.models.gpt2.pretrained import GPT2

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PROMPT = "If you want to keep a secret,"

# The picture of the page is kept here, if this is set: docs/page.png.
PICTURE = "PAGE_PICTURE"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


@dataclass
class Running:
    """A page's process and its address."""

    process: subprocess.Popen[str]
    url: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jaxgpt2.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    """The bundled model's linear layers on a server, masks for 2,048 tokens, and the page's process."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "XDG_STATE_HOME": str(home / "state"), "XDG_DATA_HOME": str(home / "data")}

    def run(*arguments: object) -> None:
        subprocess.run(command(*arguments), env=environment, check=True, capture_output=True)

    run("compile", "--encrypt", "linear", "--out", home / "out")
    with served.running(home / "out" / "server", home / "served") as server:
        client = ("--server", server.url, "--client", home / "out" / "client")
        run("prepare", *client)
        process = subprocess.Popen(
            command("page", *client, "--model", "tiny", "--json"), env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            yield Running(process, json.loads(process.stdout.readline())["url"])
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1200, "height": 760}, reduced_motion="reduce",
        )  # fmt: skip
        yield context
        context.close()


def test_a_text_is_written_and_read_with_the_keyboard(running: Running, browser, tmp_path: Path):
    from playwright.sync_api import expect

    gpt2 = GPT2.from_pretrained("tiny")
    tokens = list(gpt2.generate(PROMPT, 24))
    page, asked, said = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(running.url)
    expect(page.locator("#masks")).to_have_text("2,048")

    # In the order in which one reads: prompt, mode, count, button.
    focused = []
    for _ in range(4):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert focused == ["prompt", "mode", "count", "go"]

    def written() -> str:
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text(re.compile("^(Done|It did not work)"), timeout=120_000)
        return page.locator("#text").inner_text()

    assert written() == PROMPT + gpt2.text(tokens)
    assert page.locator("#status").inner_text().startswith("Done: 24 tokens in")
    left = 2048 - (len(gpt2.encode(PROMPT)) + 24 - 1)
    assert page.locator("#masks").inner_text() == f"{left:,}"
    received = page.get_by_role("group", name="First numbers that the server received").locator("span")
    true = page.get_by_role("group", name="First true numbers").locator("span")
    numbers = [int(cell) for cell in received.all_inner_texts()]
    was = [int(cell.replace("\N{MINUS SIGN}", "-")) for cell in true.all_inner_texts()]
    assert len(numbers) == len(was) == 24
    assert max(numbers) > 2**28 and all(abs(number) <= 2047 for number in was)  # fails once in 2^96 texts

    # A text once more takes less time, for nothing is compiled: that is the one of the picture.
    written()
    slider = page.get_by_label("Token shown on the right")
    slider.focus()
    for _ in range(16):
        page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == f"token 8 of 24: {gpt2.text(tokens[7:8])}"
    assert page.locator("#text .shown").inner_text() == gpt2.text(tokens[7:8])
    for side in ("received", "true"):
        label = page.locator(f"#{side}-histogram").get_attribute("aria-label")
        assert label.startswith("Histogram of 7,168 numbers in 32 bins")  # 4 layers of 3 * 256 + 1,024 inputs
    picture = tmp_path / "page.png"
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size < 300_000
    if PICTURE in os.environ:
        shutil.copyfile(picture, os.environ[PICTURE])

    page.get_by_label("Float: all here, nothing is sent").check()
    page.get_by_role("button", name="Continue").focus()
    assert written() == PROMPT + gpt2.text(tokens)
    assert "It is the private text, letter by letter." in page.locator("#status").inner_text()
    assert page.get_by_text("Nothing was sent").is_visible() and not page.locator("#seen").is_visible()
    assert page.locator("#sent").inner_text() == "0.00 MB"
    assert not said, said
    assert {url.split("/")[2] for url in asked if not url.startswith("data:")} == {running.url.split("/")[2]}
    page.close()


def test_ctrl_c_ends_it(running: Running):
    """Last of this file: the page is gone after it."""
    running.process.send_signal(signal.SIGINT)
    _, errors = running.process.communicate(timeout=30)
    assert running.process.returncode == 130, errors
    assert errors.splitlines()[-1] == "jaxgpt2: stopped" and "Traceback" not in errors

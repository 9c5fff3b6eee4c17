"""The command `page`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from jaxgpt2.cli.linear import linear_client, open_store
from jaxgpt2.cli.options import Directory, connection_options, json_option, options
from jaxgpt2.errors import MissingExtra
from jaxgpt2.progress import note, step


@click.command()
@options(connection_options)
@click.option("--masks", type=Directory(), metavar="DIR",
              help="Masks, from prepare.  [default: the user's data directory]")  # fmt: skip
@click.option("--model", metavar="tiny|DIR|HUB_ID", help="The float model, to compare with; it is loaded here.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 takes a free one.")
@json_option
def page(server: str | None, client: Path | None, masks: Path | None, model: str | None, port: int, as_json: bool,
         **connecting: Any) -> None:  # fmt: skip
    """Show private texts in a browser of this machine, and beside them what the server received for them.

    Prints the page's address, which is secret: whoever knows it may use your masks.
    """
    try:
        from jaxgpt2.serving.page import Page, serve_page
    except ImportError as error:
        raise MissingExtra(error, "page", "page") from None
    from jaxgpt2.models.gpt2.pretrained import GPT2
    from jaxgpt2.serving.address import listen_on

    own, open_owner = linear_client("page", server, client, connecting)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen_on("127.0.0.1", port))
        owner = open_owner()
        stack.enter_context(contextlib.closing(owner.connection))
        owner.check(own.identity)
        store = stack.enter_context(contextlib.closing(open_store(own, masks)))
        gpt2 = None
        if model is not None:
            with step("loading the float model"):
                gpt2 = GPT2.from_pretrained(model)

        def tell(url: str) -> None:
            click.echo(json.dumps({"url": url}) if as_json else url)
            note("open it in a browser of this machine; Ctrl-C ends it")

        serve_page(Page(own, owner, store, gpt2), listener, tell)

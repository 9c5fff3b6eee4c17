"""The command line. Results go to standard output, everything else to standard error; bad input exits with 2, Ctrl-C
with 130."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from jaxgpt2.errors import InputError, shown

# Imported when they are called, or listed: module and attribute.
COMMANDS = {
    "check-attention": ("check", "check_attention"),
    "compile": ("compile", "compile_command"),
    "eval": ("evaluate", "evaluate_command"),
    "generate": ("generate", "generate"),
    "info": ("info", "info"),
    "page": ("page", "page"),
    "prepare": ("linear", "prepare"),
    "serve": ("serve", "serve"),
    "sweep": ("sweep", "sweep"),
    "token": ("serve", "token"),
    "tune": ("tune", "tune"),
}


# They compute for long; what is said of one that Ctrl-C had to kill.
SUPERVISED = dict.fromkeys(("compile", "eval", "generate", "prepare", "tune"), "stopped") | {
    "sweep": "stopped; the same command with --resume goes on"
}


def refuse(message: str) -> NoReturn:
    click.echo(f"jaxgpt2: {shown(message)}", err=True)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that input causes become one line on standard error and exit status 2; Ctrl-C ends with 130."""
    from fhe import FHEError
    from weights import CheckpointError

    try:
        yield
    except click.UsageError as error:  # click's to handle
        raise click.UsageError(shown(error.format_message()), error.ctx) from None
    except (InputError, CheckpointError, FHEError) as error:
        refuse(str(error))
    except OSError as error:  # of the disk or the network: full, gone, not allowed
        if error.errno == errno.EPIPE:  # click's to handle
            raise
        place = f": {error.filename}" if error.filename else ""
        refuse(f"{(error.strerror or str(error)).lower()}{place}")
    except KeyboardInterrupt:
        click.echo("jaxgpt2: stopped", err=True)
        sys.exit(130)


class Commands(click.Group):
    """A group of commands with `one_line_errors`, and as a program `supervised`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not arguments and not options and sys.argv[1:2] and sys.argv[1] in SUPERVISED:
            from jaxgpt2.cli.supervise import supervised

            sys.exit(supervised(self.main, SUPERVISED[sys.argv[1]]))
        return super().__call__(*arguments, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        return getattr(importlib.import_module(f"jaxgpt2.cli.{module}"), attribute)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(importlib.metadata.version("jaxgpt2"))
def main() -> None:
    """GPT-2 of which chosen parts run on encrypted data."""

"""The command line, one file for each group of commands."""

from jaxgpt2.cli.app import main

__all__ = ["main"]

"""The command line."""

from gradshield.cli.commands import main

__all__ = ["main"]

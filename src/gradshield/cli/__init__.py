"""The command line."""

import os

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads every installed package

from gradshield.cli.commands import main

__all__ = ["main"]

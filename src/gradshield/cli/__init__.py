"""The command line."""

import os
import sys

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads every installed package

try:
    from gradshield.cli.commands import main
except KeyboardInterrupt:  # Ctrl-C while Python still imports
    print("gradshield: stopped: nothing was saved yet", file=sys.stderr)
    sys.exit(130)

__all__ = ["main"]

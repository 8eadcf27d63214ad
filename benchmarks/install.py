"""Installs the peers (the extra `bench`) beside this environment's torch and transformers, which stay as they are.

bergson and kronfluence also ask for torchvision and torchaudio, which they import nowhere on our way and whose wheels
fit one build of torch only (beside a CPU build, importing them fails): these two are left out.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

KEPT = ("torch", "transformers")
LEFT_OUT = {"torch", "torchvision", "torchaudio"}
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def main() -> None:
    """The peers themselves without what they ask for, then what they ask for, with torch and transformers pinned."""
    peers = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["bench"]
    pip("--no-deps", *peers)
    wanted = {
        need
        for peer in peers
        for need in requires(_name(peer)) or []
        if "extra ==" not in need and _name(need) not in LEFT_OUT
    }
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{package}=={version(package)}\n" for package in KEPT))
        constraints.flush()
        pip("-c", constraints.name, *sorted(wanted))


def pip(*arguments: str) -> None:
    """pip install, quietly; ends the program where it fails."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"could not be installed: {' '.join(arguments)}")


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found.group().lower() if found else requirement


if __name__ == "__main__":
    main()

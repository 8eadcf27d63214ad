"""Templates → a page on the disk. Every string passes `visible` (invisible characters are written out) and is then
escaped, so a place in a template can't forget it."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from gradshield.base.errors import UserError
from gradshield.base.storage import write_text
from gradshield.report.text import about, number, percent, short, visible


def write_page(path: Path, template: str, **context: Any) -> None:
    """Writes the filled-in template to `path` in one move, so that nobody opens half a page.

    Raises UserError if the file can't be written.
    """
    page = templates(Path(__file__).parent, longest=20_000).get_template(template).render(context)
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); free some space or change the folder") from None


def as_yaml(settings: Mapping[str, Any]) -> str:
    """The settings as text, paths and numpy numbers among them."""
    plain = json.loads(json.dumps(settings, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


@cache
def templates(folder: Path, longest: int | None = None) -> Environment:
    """The templates of a folder, which print every value with what is not seen written out, and then escaped."""

    def final(value: Any) -> Any:
        if isinstance(value, Markup):
            return value
        text = str(value) if longest is None else short(value, longest)
        return text if text.isascii() and text.isprintable() else visible(text)

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=final,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(inf=math.inf)
    environment.filters.update(number=number, short=short, percent=percent, about=about)
    environment.filters["exact"] = lambda text: Markup(escape(text))  # for fields, whose content comes back
    return environment

"""A report as one HTML page that needs nothing but itself."""

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from ..markdown import one_line

TEMPLATE = files("hf_modx").joinpath("templates", "report.html")


def render_page(**content: Any) -> str:
    """The page. Every value is escaped, whatever it holds; control characters and those that turn the direction of
    writing are left out. Pictures are inlined, and the page forbids the browser every request.

    Args:
        content: what the template names: `title`, `about`, `runs` (header, rows), `comparisons`, `pictures`,
            `matrices` (pictures, too), `numbers` (by recipe: header, rows), `classes` (by recipe, see `LostClasses`),
            `flips` (by recipe, see `FlippedTest`).
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.filters |= {"inlined": _inlined, "inlined_image": _inlined_image}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**content)


def _printable(value: Any) -> Any:
    return value if isinstance(value, Markup) else one_line(value)


def _inlined(file: Path) -> str:
    return _data_uri(file.read_bytes())


def _inlined_image(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

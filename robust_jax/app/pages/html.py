"""What the pages share: their templates, and figures as data URIs."""

import base64
import io
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

_LARGE = 250_000  # of a figure, in characters


def template(name: str) -> jinja2.Template:
    """A template of this folder; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robust_jax.app.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def image(figure: Figure, alt: str, **about: Any) -> dict[str, Any]:
    """The figure as a data URI, SVG or, if that is large, PNG, with its size in CSS pixels."""
    # Fixed salt and no date: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "robust_jax"}):
        source = _source(figure, "svg", "svg+xml", {"Date": None})
        # Freezes the layout, so that saving the figure again does not recompute it.
        figure.set_layout_engine("none")
        if len(source) > _LARGE:
            source = min(source, _source(figure, "png", "png", {}), key=len)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return {"src": source, "alt": alt, "width": width, "height": height, **about}


def _source(figure: Figure, kind: str, mime: str, metadata: dict) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return f"data:image/{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"

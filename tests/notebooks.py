"""Runs notebooks cell by cell in this process: a kernel each would compile everything again."""

import ast
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The source of each cell, without magics, and the kinds of output that are committed."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            yield source, [output["output_type"] for output in cell["outputs"]]


def run_cell(source: str, namespace: dict[str, Any]) -> list[str]:
    """Runs a cell as a kernel does, draws what it shows, and returns the kinds of output."""
    *body, last = ast.parse(source).body
    kinds = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), "a cell", "exec"), namespace)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "a cell", "eval"), namespace)
    if printed.getvalue():
        kinds.append("stream")
    if value is not None:
        value.draw_without_rendering() if isinstance(value, Figure) else value._repr_html_()
        kinds.append("execute_result")
    return kinds

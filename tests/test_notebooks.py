"""Every notebook says what to do where there is no run; test_demo.py runs them on the demo's."""

import json

import pytest

from robust_jax.errors import UserError
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def code_cells(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(line for line in cell["source"] if not line.startswith("%"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_a_run_a_notebook_says_what_to_do(path, monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("ROBUST_JAX_RUN", str(folders[0]))
    monkeypatch.setenv("ROBUST_JAX_RUNS", " ".join(map(str, folders)))
    namespace = {}
    with pytest.raises(UserError, match="holds nothing and no run; train one with") as found:
        for cell in code_cells(path):
            exec(cell, namespace)
    assert len(str(found.value).splitlines()) == 1

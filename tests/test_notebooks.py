"""Without a run, every notebook says what to do; test_demo.py runs them on the demo's run."""

import pytest

from robust_jax.errors import UserError
from tests.notebooks import NOTEBOOKS, code_cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_a_run_a_notebook_says_what_to_do(path, monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("ROBUST_JAX_RUN", str(folders[0]))
    monkeypatch.setenv("ROBUST_JAX_RUNS", " ".join(map(str, folders)))
    namespace = {}
    with pytest.raises(UserError, match="holds nothing and no run; train one with") as found:
        for source, _ in code_cells(path):
            exec(source, namespace)
    assert len(str(found.value).splitlines()) == 1

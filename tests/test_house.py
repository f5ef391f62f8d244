"""The floors of the house: what may import what, and what an import brings with it."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "robust_jax"
# From the top floor down; the library is everything else.
FLOORS = ("robust_jax.app", "robust_jax.train")


@functools.cache
def modules() -> dict[str, set[str]]:
    """What each module of robust_jax imports, anywhere in it."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                found[name] |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    """0 is the top floor."""
    for i, prefix in enumerate(FLOORS):
        if name == prefix or name.startswith(f"{prefix}."):
            return i
    return len(FLOORS)


def test_no_floor_imports_one_above_it():
    found = {**modules()}
    assert {floor(name) for name in found} == {0, 1, 2}
    del found["robust_jax"]  # it fronts all three floors
    for name, imported in found.items():
        ours = {one for one in imported if one.startswith("robust_jax")}
        above = sorted(one for one in ours if floor(one) < floor(name))
        assert not above, f"{name} imports {', '.join(above)}"


def test_no_module_is_hidden_by_a_function_of_its_name():
    for path in PACKAGE.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(REPOSITORY).parts)
        hidden = {one for one in modules()[package] if one.startswith(f"{package}.")}
        for one in hidden:  # package.module.name
            *_, module, name = one.split(".")
            assert module != name, f"{package} exports {name}, which hides the module {module}"


def test_the_application_alone_knows_configs():
    for name, imported in modules().items():
        if floor(name):
            assert not any(one.startswith("ml_collections") for one in imported), name


@pytest.mark.parametrize(
    "module, without",
    [
        ("robust_jax", ("jax", "numpy")),
        ("robust_jax.app.pages.report", ("jax",)),
        ("robust_jax.attacks", ("flax", "matplotlib", "pandas", "sklearn", "orbax")),
    ],
)
def test_an_import_brings_nothing_heavy(module, without):
    code = f"import sys, {module}; sys.exit(' '.join({set(without)} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ANALYSIS = ("calibration", "features", "latent", "spectra", "summaries", "surface")


def test_tab_completion_shows_the_public_names_alone():
    import robust_jax

    assert set(dir(robust_jax)) == {*robust_jax.__all__, "__version__"}
    for name in robust_jax.__all__:
        found = getattr(robust_jax, name)
        assert found is not None
        if inspect.ismodule(found) and found is not robust_jax.errors:  # it has no other names
            assert set(dir(found)) == set(found.__all__), name
    for name in ("plots", "types", *(f"analysis.{one}" for one in ANALYSIS)):
        found = importlib.import_module(f"robust_jax.{name}")
        assert set(dir(found)) == set(found.__all__), name


def test_no_module_imports_itself_by_way_of_others():
    found = {**modules()}
    del found["robust_jax"]  # it imports the rest lazily
    ours = {
        name: {one if one in found else one.rpartition(".")[0] for one in imported} & set(found)
        for name, imported in found.items()
    }
    while leaves := {name for name, imported in ours.items() if not imported}:
        ours = {name: imported - leaves for name, imported in ours.items() if name not in leaves}
    assert not ours, f"a circle among {', '.join(sorted(ours))}"

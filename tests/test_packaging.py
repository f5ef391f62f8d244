"""The declared requirements, and a wheel that works without the sources."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

# Nothing here imports them: TFDS does, without declaring them on every platform.
IMPORTED_BY_OTHERS = {"array-record", "importlib-resources"}

# A model that is a plain function, in a process that cannot see the sources.
ATTACK = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import robust_jax
from robust_jax import attacks, jacobian, losses

assert Path(robust_jax.__file__).is_relative_to(sys.prefix), robust_jax.__file__
for name in set(robust_jax.__all__) - {"evaluate", "Evaluation"}:  # these need the extra train
    getattr(robust_jax, name)
weights = jax.random.normal(jax.random.key(0), (16, 3))
logits_fn = lambda x: x.reshape(len(x), -1) @ weights
x = jax.random.uniform(jax.random.key(1), (8, 4, 4, 1))
y = logits_fn(x).argmax(-1)
x_adv = attacks.pgd(logits_fn, x, y, jax.random.key(2), eps=0.1, num_steps=5)
assert abs(x_adv - x).max() <= 0.1 + 1e-6
assert (losses.margin(logits_fn(x_adv), y) < losses.margin(logits_fn(x), y)).all()
norms = jacobian.frobenius_norm(logits_fn, x)
assert jnp.allclose(norms, jnp.linalg.norm(weights), rtol=1e-5)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str = "") -> set[str]:
    """The packages in setup.cfg, those of the base install or of an extra."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = (
        setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"]
    )
    return {normalized(Requirement(line).name) for line in lines.split("\n") if line}


def imported(*paths: str) -> set[str]:
    """The packages that these files or folders import, anywhere in them."""
    modules = set()
    for path in map(REPOSITORY.joinpath, paths):
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add(node.module.split(".")[0])
    modules -= sys.stdlib_module_names | {"robust_jax", "configs", "launch", "tests", "benchmarks"}
    homes = packages_distributions()
    return {normalized(home) for name in modules for home in homes.get(name, [name])}


def test_every_package_imported_is_declared_and_the_other_way_round():
    ours = imported("robust_jax", "configs", "launch.py")
    assert ours == (declared() | declared("train")) - IMPORTED_BY_OTHERS
    everything = {name for extra in ("", "train", "test", "notebooks") for name in declared(extra)}
    assert imported("tests") <= everything


def base_distributions() -> set[str]:
    """The packages of a bare install: the declared ones and all that those require."""
    found, waiting = set(), [Requirement(name) for name in declared()]
    while waiting:
        requirement = waiting.pop()
        if (name := normalized(requirement.name)) in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                waiting.append(one)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves files in the folder that it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "robust_jax", source / "robust_jax", ignore=ignore)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "--wheel-dir",
            out,
            source,
        ],
        check=True,
    )
    (path,) = out.glob("*.whl")
    return path


def environment(folder: Path, wheel: Path, *pip: str) -> tuple[Path, Path]:
    """An environment with the wheel: its interpreter and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *pip,
            wheel,
        ],
        check=True,
    )
    paths = {"base": str(folder), "platbase": str(folder)}
    return python, Path(sysconfig.get_path("purelib", vars=paths))


def test_the_wheel_holds_the_whole_package(wheel):
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "robust_jax").rglob("*")
        if path.suffix in (".py", ".j2", ".typed")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {"robust_jax/py.typed", "robust_jax/app/pages/templates/report.html.j2"} <= files


def test_the_wheel_attacks_a_model_with_the_packages_of_a_bare_install(wheel, tmp_path):
    python, site = environment(tmp_path / "venv", wheel, "--no-deps", "--no-index")
    for name in base_distributions():
        for file in distribution(name).files or []:
            first = file.parts[0]
            if first not in ("..", "__pycache__") and not (site / first).exists():
                (site / first).symlink_to(distribution(name).locate_file(first))
    result = subprocess.run(
        [python, "-I", "-c", ATTACK], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    # Each declared package is needed.
    assert declared() <= set(map(normalized, result.stdout.split()))


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_attacks_a_model(wheel, tmp_path):
    lock = REPOSITORY / "requirements.lock"
    python, _ = environment(tmp_path / "venv", wheel, f"--constraint={lock}")
    subprocess.run([python, "-I", "-c", ATTACK], check=True, cwd=tmp_path)

"""The examples in README, CONTRIBUTING and docs/ run, and what they name exists."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_jax
from configs import default
from robust_jax import attacks, losses
from robust_jax._front import compiled
from robust_jax.attacks import norms
from robust_jax.keys import example_keys
from robust_jax.plots import networks
from tests.conftest import REPOSITORY
from tests.linear import interior_images, make_linear
from tests.pages import code
from tests.test_docstrings import check_docstring

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def blocks():
    return code("CONTRIBUTING.md")


def test_the_example_loss_works(blocks, monkeypatch):
    namespace = dict(vars(losses))
    exec(next(b for b in blocks if "def focal" in b), namespace)
    monkeypatch.setattr(losses, "focal", namespace["focal"], raising=False)
    check_docstring(losses.focal)
    logits, labels = jax.random.normal(KEY, (6, 4)), jnp.arange(6) % 4
    p = losses.confidence(logits, labels)
    np.testing.assert_allclose(
        namespace["focal"](logits, labels), -((1 - p) ** 2) * jnp.log(p), rtol=1e-4
    )


def test_the_example_attack_works(blocks, monkeypatch):
    namespace = {"jax": jax, "norms": norms, "example_keys": example_keys, "compiled": compiled}
    exec(next(b for b in blocks if "def random_corner" in b), namespace)
    monkeypatch.setattr(attacks, "random_corner", namespace["random_corner"], raising=False)
    check_docstring(attacks.random_corner)
    logits_fn, _, _ = make_linear(KEY)
    x = interior_images(KEY, 5)
    x_adv = namespace["random_corner"](logits_fn, x, jnp.zeros(5, jnp.int32), KEY, eps=0.1)
    np.testing.assert_allclose(np.abs(x_adv - x), 0.1, rtol=1e-5)


def test_the_example_data_set_loads(blocks, tmp_path, monkeypatch):
    from robust_jax import data

    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (20, 5, 5), dtype=np.uint8) for _ in range(2))
    y_train = y_test = np.arange(20) % 2
    monkeypatch.chdir(tmp_path)
    exec(
        next(b for b in blocks if "mine.npz" in b),
        {"np": np, "x_train": x_train, "x_test": x_test, "y_train": y_train, "y_test": y_test},
    )
    assert data.load("npz:mine.npz", validation_size=4).num_classes == 2


@pytest.mark.parametrize("attack", ["pgd", "apgd", "fab"])
def test_the_example_threat_model_bounds_attacks(blocks, attack):
    namespace = {"dataclasses": dataclasses, "jnp": jnp, "math": math, "norms": norms}
    exec(next(b for b in blocks if "VISIBLE" in b), namespace)
    weights = jax.random.normal(KEY, (48, 3))
    x = jax.random.uniform(jax.random.key(1), (4, 4, 4, 3))
    logits_fn = lambda x: x.reshape(len(x), -1) @ weights  # noqa: E731
    y = logits_fn(x).argmax(-1)
    norm = namespace["VISIBLE"]
    x_adv = attacks.ATTACKS[attack](logits_fn, x, y, KEY, eps=0.02, norm=norm)
    assert (logits_fn(x_adv).argmax(-1) != y).all()
    assert jax.vmap(norm.size)(x_adv - x).max() <= 0.02 + 1e-6
    assert np.abs(x_adv - x).max() > 0.02  # in blue, which the eye hardly sees


def test_the_example_figure_is_drawn(blocks, rng):
    namespace = dict(vars(networks))
    exec(next(b for b in blocks if "def confidences" in b), namespace)
    assert {"Args:", "Returns:", "Example:"} <= set(namespace["confidences"].__doc__.split())
    (ax,) = namespace["confidences"](rng.random(50)).axes
    assert sum(bar.get_height() for bar in ax.patches) == 50
    assert ax.get_xlabel() and ax.get_ylabel()


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_modules_and_fields_that_exist(page):
    text = (REPOSITORY / page).read_text()
    files = [f"/{p.relative_to(REPOSITORY)}" for p in REPOSITORY.glob("*.py")]
    for folder in ("robust_jax", "configs", "tests", "benchmarks"):
        files += [f"/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / folder).rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`|--config=(\S+\.py)", text):
        assert any(file.endswith(f"/{''.join(name)}") for file in files), name
    for folder in re.findall(r"`((?:robust_jax|configs|docs)/[\w/]*/)`", text):
        assert (REPOSITORY / folder).is_dir(), folder
    for link in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (REPOSITORY / page).parent.joinpath(link).exists(), link
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert importlib.util.find_spec(module), module
    for field in re.findall(r"--config\.(\w+)", text):
        assert field in default.get_config() or field == "scale", field


def test_the_map_of_the_code_names_every_module():
    named = set(re.findall(r"`([\w/]+\.py)`", (REPOSITORY / "docs" / "design.md").read_text()))
    package = REPOSITORY / "robust_jax"
    files = [*package.glob("*.py"), *(package / "devices").glob("*.py")]
    files += [*(package / "train").glob("*.py"), *(package / "app").rglob("*.py")]
    modules = {str(p.relative_to(package)) for p in files if p.name != "__init__.py"}
    assert modules - named == set()


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in REPOSITORY.glob("docs/reference/*.md"))
    for name in robust_jax.__all__:
        assert re.search(rf"robust_jax\.(attacks\.)?{name}$", text, re.MULTILINE), name


def test_the_readme_library_example_runs():
    (example,) = code("README.md")
    call = 'attacks.autoattack(logits_fn, x, y, key, eps=8 / 255, norm="linf"'
    assert f"{call})" in example
    # Two of AutoAttack's members, since test_autoattack.py compiles all four.
    example = example.replace(call, f'{call}, version=("apgd_ce", "square")')
    logits_fn, _, _ = make_linear(KEY)

    class Model:
        def apply(self, variables, x):
            return logits_fn(x)

    x = interior_images(KEY, 3)
    namespace = {"model": Model(), "variables": {}, "x": x, "y": logits_fn(x).argmax(-1)}
    exec(example, namespace)
    assert namespace["x_adv"].shape == x.shape
    assert namespace["result"].robust.shape == (3,)
    assert namespace["report"].verdict in ("pass", "warn", "fail")
    assert namespace["norms"].shape == (3,)


def test_the_verdicts_in_findings_are_those_of_the_studies():
    studies = REPOSITORY / "docs" / "studies"
    verdicts = {
        (claim["text"], claim["verdict"])
        for path in studies.glob("*/results.json")
        for claim in json.loads(path.read_text())["claims"].values()
    }
    rows = re.findall(
        r"^\| ([^|]+\.) \| (\w[^|]*) \|", (REPOSITORY / "docs" / "findings.md").read_text(), re.M
    )
    assert len(rows) > 20
    assert [row for row in rows if row not in verdicts] == []


def test_figures_of_studies_are_small_and_all_shown():
    for page in (REPOSITORY / "docs" / "studies").glob("*/results.md"):
        figures = list((page.parent / "figures").iterdir())
        assert [path.name for path in figures if path.stat().st_size > 200_000] == []
        assert {f"figures/{path.name}" for path in figures} == set(
            re.findall(r"\]\((figures/[^)]+)\)", page.read_text())
        )

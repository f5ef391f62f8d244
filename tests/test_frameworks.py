"""Networks of other frameworks, as docs/attack_your_model.md writes them."""

import contextlib
import functools
import io
import symtable

import jax
import numpy as np
import pytest

import robust_jax
from robust_jax import attacks, jacobian
from robust_jax._network import as_network
from tests.calls import lowerings
from tests.pages import code, missing

# What each function of the page computes for images [N,8,8,1], in its own framework.
SECTIONS = {
    "linen_fn": lambda page, x: page["linen"].apply(page["variables"], x),
    "nnx_fn": lambda page, x: page["nnx_fn"](x),
    "equinox_fn": lambda page, x: [page["equinox"](image.transpose(2, 0, 1)) for image in x],
    "haiku_fn": lambda page, x: page["haiku"].apply(page["params"], page["state"], x)[0],
    "keras_fn": lambda page, x: page["keras_model"].predict(x, verbose=0),
    "torchax_fn": lambda page, x: page["module"](channels_first(page, x)).numpy(),
    "torch_fn": lambda page, x: page["module"](channels_first(page, x)).numpy(),
    "converted_fn": lambda page, x: page["module"](channels_first(page, x)).numpy(),
    "black_box": lambda page, x: page["numpy_model"](x),
}
WITHOUT_GRADIENT = ("black_box",)
FEW = {"apgd_ce": {"num_steps": 3}, "square": {"num_queries": 5}}
EPS, PAGES_EPS = 0.05, 0.1
AUTOATTACK = 'attacks.autoattack(logits_fn, x, y, key, eps=0.1, norm="linf"'
# All four members are compiled in test_autoattack.py.
TWO_MEMBERS = f'{AUTOATTACK}, version=("apgd_ce", "square")'


def channels_first(page, x):
    return page["torch"].tensor(x).permute(0, 3, 1, 2)


@functools.cache
def page() -> dict:
    """Runs the page from top to bottom; returns its names, with what it prints as `printed`."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in code("docs/attack_your_model.md"):
            if not missing(block):
                exec(block.replace(AUTOATTACK, TWO_MEMBERS), names)
    return {**names, "printed": printed.getvalue()}


def test_the_page_runs_from_top_to_bottom():
    names = page()
    x, y, result = names["x"], names["y"], names["result"]
    assert any(f"{AUTOATTACK}, progress=False)" in b for b in code("docs/attack_your_model.md"))
    clean = names["logits_fn"](x).argmax(-1) == y
    assert clean.mean() > 0.85
    assert 0 < result.robust.mean() < clean.mean() - 0.2
    assert names["report"].verdict == "pass", names["report"]
    assert np.abs(names["all_of_them"][7] - names["just_one"][0]).max() < 1e-6
    broken = names["black_box"](names["x_adv"]).argmax(-1) != y
    assert broken.mean() > (~clean).mean()
    assert (names["black_box"](x).argmax(-1) == y).mean() > 0.85
    assert "transfer" in names["printed"]


def read_by_functions(table):
    """The names of a module that functions in it read when they are called."""
    found = set()
    for inner in table.get_children():
        if inner.get_type() == "function":
            found |= set(inner.get_globals())
        found |= read_by_functions(inner)
    return found


def test_no_section_of_the_page_takes_a_name_that_an_earlier_function_reads():
    read = set()
    for block in code("docs/attack_your_model.md"):
        table = symtable.symtable(block, "page", "exec")
        bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
        assert not bound & read, block
        read |= read_by_functions(table)


def network(name):
    """Returns (the function, 20 images, the framework's own logits of them), or skips."""
    if name not in page():
        pytest.skip(f"the package for {name} is not installed")
    x = page()["x"][:20]
    return page()[name], x, np.asarray(SECTIONS[name](page(), x))


def calls(logits_fn, x, y, key):
    """What a user calls on a network; each call returns arrays."""

    def autoattack(version):
        return attacks.autoattack(
            logits_fn,
            x,
            y,
            key,
            eps=EPS,
            version=version,
            overrides={name: FEW[name] for name in version},
            progress=False,
        )

    return {
        # The page makes the same call, so it is already compiled.
        "pgd": lambda: attacks.pgd(logits_fn, page()["x"], page()["y"], key, eps=PAGES_EPS),
        "frobenius_norm": lambda: jacobian.frobenius_norm(logits_fn, x),
        "autoattack": lambda: autoattack(("apgd_ce", "square")).robust,
        "square": lambda: autoattack(("square",)).robust,
    }


@pytest.mark.parametrize("name", SECTIONS)
def test_logits_are_the_frameworks_own(name):
    logits_fn, x, own = network(name)
    traced = jax.jit(as_network(logits_fn, x.shape[1:], x.dtype))
    assert np.ptp(own) > 0.1
    np.testing.assert_allclose(traced(x), own, atol=1e-5)


@pytest.mark.parametrize("name", SECTIONS)
def test_attacks_and_norms_work_and_compile_once(name):
    logits_fn, x, own = network(name)
    y, key = own.argmax(-1), jax.random.key(1)
    for call, fn in calls(logits_fn, x, y, key).items():
        if (name in WITHOUT_GRADIENT) != (call == "square"):
            continue
        first = fn()
        if call == "pgd":
            assert 0 < np.abs(first - page()["x"]).max() <= PAGES_EPS + 1e-6
        with lowerings() as seen:
            again = fn()
        assert not seen, f"{call} compiled {len(seen)} programs again"
        np.testing.assert_array_equal(first, again)


# The page already audits one function and evaluates linen_fn, which audits it too.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in WITHOUT_GRADIENT])
def test_the_audit_works(name):
    logits_fn, x, own = network(name)
    report = robust_jax.audit(
        logits_fn, x, own.argmax(-1), jax.random.key(1), eps=EPS, num_queries=5, progress=False
    )
    verdicts = {check.name: check.verdict for check in report.checks}
    assert {verdicts[check] for check in ("outputs", "randomness", "batch")} == {"pass"}


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in WITHOUT_GRADIENT])
def test_gradients_are_the_frameworks_own(name):
    logits_fn, x, own = network(name)
    images = x[:2]
    if name in ("torchax_fn", "torch_fn", "converted_fn"):
        torch = page()["torch"]
        image = torch.tensor(images, requires_grad=True)
        logits = page()["module"](image.permute(0, 3, 1, 2))
        rows = [
            torch.autograd.grad(logits[:, k].sum(), image, retain_graph=True)[0].numpy()
            for k in range(10)
        ]
        expected = np.stack(rows, 1)
    else:
        expected = jax.jit(jax.vmap(jax.jacrev(lambda image: logits_fn(image[None])[0])))(images)
    found = jacobian.jacobian(logits_fn, images)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_published_order_of_tfds_is_found(tmp_path):
    from tensorflow_datasets.core.shuffle import Shuffler

    (block,) = (block for block in code("docs/attack_your_model.md") if "Hasher" in block)
    names = {"np": np}
    exec(block, names)
    shuffler = Shuffler(tmp_path, "test")
    for i in range(50):
        shuffler.add(i, str(i).encode())
    rows = np.array([int(data) for _, data in shuffler])
    assert (rows != np.arange(50)).any()
    np.testing.assert_array_equal(rows[names["published_order"]("test", 50)], np.arange(50))

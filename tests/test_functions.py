"""Every public function: compiled once, the same with any key, mesh or transformation around it.

It is one file because all tests share the same plain calls, whose programs are compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec

from robust_jax import attacks, energy, jacobian, losses, margins
from robust_jax.keys import example_keys
from tests.calls import (
    ALL,
    ATTACKS,
    EPS,
    FUNCTIONS,
    KEYLESS_NORMS,
    WITH_EPS,
    WITHOUT_KEY,
    lowerings,
)
from tests.conftest import slow_but
from tests.small_networks import (
    KEY,
    chex_close,
    examples,
    exported,
    network,
    on_mesh,
    weights_of,
)

LOOPS = ("autoattack", "audit")
# PGD with other settings; `make test-slow` runs them where each function is compiled again.
LIKE_PGD = ("bim", "fgsm", "mim", "multi_targeted", "uniform_noise", "transfer", "rise")
NOT_LIKE_PGD = [name for name in FUNCTIONS if name not in LIKE_PGD]
# One of each kind: an attack, a norm with an error, a setting that is an attack, no key.
KINDS = ("pgd", "frobenius_norm_estimate", "minimum_norm", "is_adversarial")


def examples_for(name, seed=0):
    """Loops get more, so that the number that an attack leaves varies by whole batches."""
    return examples(seed, 48 if name in LOOPS else 8)


@functools.cache
def plain(name):
    """What a plain call gives."""
    return ALL[name](network(weights_of(0)), *examples_for(name), KEY)


def test_every_function_behind_the_front_door_is_called_here():
    modules = (attacks, energy, jacobian, margins)
    public = {name: fn for module in modules for name, fn in vars(module).items()}
    found = {name for name, fn in public.items() if getattr(fn, "is_compiled", False)}
    assert found == set(FUNCTIONS)


@pytest.mark.parametrize("name", ALL)
def test_is_compiled_once_for_other_batches_keys_radii_and_weights(name):
    fn = ALL[name]
    calls = [
        (network(weights_of(seed)), *examples_for(name, seed), jax.random.key(seed))
        for seed in (1, 2)
    ]
    plain(name)
    with lowerings() as seen:
        for i, (logits_fn, x, y, key) in enumerate(calls):
            y = jnp.argmax(logits_fn(x), -1)
            y = y.at[: i + 1].set((y[: i + 1] + 1) % 4)  # others are wrong, so others stand
            seen.clear()
            eps = {"eps": EPS.get(name, 0.1) * (1 - i / 4)}
            fn(logits_fn, x, y, key, **eps if name in (*WITH_EPS, *LOOPS) else {})
            assert not seen, f"{name} compiled {len(seen)} programs again"


# Loops: tests/test_front.py.
@pytest.mark.parametrize("name", KINDS)
def test_is_compiled_once_on_one_device(name, monkeypatch):
    fn, expected = FUNCTIONS[name], plain(name)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    found = fn(network(weights_of(0)), *examples(), KEY)
    chex_close(found, expected)
    logits_fn, (x, y) = network(weights_of(1)), examples(1)
    with lowerings() as seen:
        fn(logits_fn, x, y, jax.random.key(1))
    assert not seen


@pytest.mark.parametrize("name", LOOPS)
def test_is_compiled_once_however_many_examples_still_stand(name):
    counts = set()
    plain(name)
    for i, num_wrong in enumerate((0, 3, 26, 42)):
        x, y = examples_for(name, i)
        y = y.at[:num_wrong].set((y[:num_wrong] + 1) % 4)
        with lowerings() as seen:
            found = ALL[name](network(weights_of(0)), x, y, jax.random.key(i))
        assert not seen, f"{name} compiled {len(seen)} programs again"
        counts.add(found.num_examples if name == "audit" else int(found.robust.sum()))
    assert len(counts) == 4


# Keys.


@pytest.mark.parametrize("name", [name for name in ALL if name not in KEYLESS_NORMS])
def test_legacy_keys_lists_and_numpy_are_taken(name):
    x, y = examples_for(name)
    other = ALL[name](
        network(weights_of(0)), np.asarray(x), list(map(int, y)), jax.random.PRNGKey(0)
    )
    if name in LOOPS:
        assert str(other) == str(plain(name))
    else:
        chex_close(other, plain(name))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_radius_is_no_change(name):
    x, y = examples()
    x_adv = FUNCTIONS[name](network(weights_of(0)), x, y, KEY, eps=0.0)
    np.testing.assert_allclose(x_adv, x, atol=1e-7)


# Without a radius total variation is left out: it is the gradient at x itself.
@pytest.mark.parametrize("name", ["mean_square", "oscillation", "rise", "path"])
def test_no_radius_is_no_energy(name):
    still = FUNCTIONS[name](network(weights_of(0)), *examples(), KEY, eps=0.0)
    np.testing.assert_allclose(still, np.zeros(8), atol=1e-5)


# Arrays of other types.


@pytest.mark.parametrize("name", ALL)
def test_arrays_of_other_types_give_the_same_and_compile_nothing(name):
    x, y = map(np.asarray, examples_for(name))
    expected = plain(name)
    with lowerings() as seen:
        in_double = ALL[name](network(weights_of(0)), x.astype(np.float64), y.astype(np.int64), KEY)
        of_bytes = ALL[name](network(weights_of(0)), x, y.astype(np.uint8), KEY)
    assert not seen
    for found in (in_double, of_bytes):
        if name in LOOPS:
            assert str(found) == str(expected)
        else:
            jax.tree.map(np.testing.assert_array_equal, found, expected)


WITH_KEY = [name for name in ALL if name not in (*WITHOUT_KEY, *KEYLESS_NORMS)]
# Each draws in its own way. Tests of evaluations and of any dtype run loops with such keys.
DRAWING = ("pgd", "square", "gaussian_noise", "clever", "spectral_norm", "mean_square")


@pytest.mark.parametrize("name", slow_but(DRAWING, WITH_KEY))
def test_keys_of_another_implementation_are_taken(name):
    x, y = examples_for(name)
    key = jax.random.key(0, impl="rbg")
    found = ALL[name](network(weights_of(0)), x, y, key)
    keys = ALL[name](network(weights_of(0)), x, y, example_keys(key, len(x)))
    assert jax.tree.structure(found) == jax.tree.structure(keys)
    if name not in LOOPS:
        chex_close(found, keys)


@pytest.mark.parametrize("name", [n for n in WITH_KEY if n not in (*DRAWING, *LOOPS)])
def test_keys_of_another_implementation_are_taken_in_a_trace(name):
    x, y = examples()
    found = jax.eval_shape(
        lambda key: FUNCTIONS[name](network(weights_of(0)), x, y, key),
        jax.random.key(0, impl="rbg"),
    )
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, plain(name))


# The caller's transformations.


@pytest.mark.parametrize("name", slow_but(NOT_LIKE_PGD, FUNCTIONS))
def test_traces_through_the_callers_transformations(name):
    """All at once; on a mesh, below, jit is the only one."""

    @jax.jit
    def transformed(weights, x, y, keys):
        @jax.vmap
        def lifted(x, y, key):
            return FUNCTIONS[name](network(weights), x[None], y[None], key[None])

        return jax.lax.scan(lambda i, _: (i, lifted(x, y, keys)), 0, length=2)[1]

    x, y = examples()
    found = transformed(weights_of(0), x, y, example_keys(KEY, len(x)))
    chex_close(jax.tree.map(lambda a: a[1, :, 0], found), plain(name))


@pytest.mark.parametrize("name", slow_but(KINDS, FUNCTIONS))
def test_traces_through_a_scan_of_the_callers_over_nothing_traced(name):
    fn, (x, y), weights = FUNCTIONS[name], examples(), weights_of(0)

    def body(carry, _):
        return carry, fn(network(weights), x, y, KEY)

    _, scanned = jax.lax.scan(body, 0, length=2)
    chex_close(jax.tree.map(lambda a: a[1], scanned), plain(name))


def gradient(name):
    """The gradient by weights and x of the loss at an attack's points, or of a function's mean."""
    x, y = examples()

    def value(weights, x):
        out = jax.tree.leaves(FUNCTIONS[name](network(weights), x, y, KEY))[0]
        if out.shape != x.shape:
            return out.mean()
        return losses.cross_entropy(network(weights)(out), y).mean()

    return functools.partial(jax.jit(jax.grad(value, (0, 1))), weights_of(0), x)


# The caller's grad sees minimum_norm's points as constants, so its distances are constants too.
WITH_DERIVATIVE = [name for name in FUNCTIONS if name not in ("is_adversarial", "minimum_norm")]
COMPILED_WITH_IT = (
    *("pgd", "apgd", "fab", "square", "frobenius_norm", "spectral_norm", "relative_slope"),
    *("first_order", "mean_square", "oscillation", "total_variation", "path"),
)


@pytest.mark.parametrize("name", slow_but(COMPILED_WITH_IT, WITH_DERIVATIVE))
def test_differentiates_through_the_callers_grad(name):
    by_weights = map(np.asarray, jax.tree.leaves(gradient(name)()[0]))
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in by_weights)


@pytest.mark.parametrize("name", ["deepfool", "fab", "jsma", "square"])
def test_what_a_search_finds_is_a_constant_to_the_callers_grad(name):
    x, y = examples()

    def total(weights, x):
        return FUNCTIONS[name](network(weights), x, y, KEY).sum()

    by_weights, by_x = jax.jit(jax.grad(total, (0, 1)))(weights_of(0), x)
    assert all((leaf == 0).all() for leaf in (*by_weights, by_x))


@pytest.mark.parametrize("name", [n for n in WITH_DERIVATIVE if n not in COMPILED_WITH_IT])
def test_is_traced_through_the_callers_grad(name):
    (first, second), x = jax.eval_shape(gradient(name))
    assert (first.shape, second.shape) == ((12, 8), (8, 4)) and x.shape == (8, 3, 4, 1)


# Functions from jax.export.

FORWARDS = ("spectral_norm", "squared_frobenius_samples", "frobenius_norm_estimate")


# In default runs tests/test_evaluation.py covers AutoAttack.
@pytest.mark.parametrize("name", slow_but(NOT_LIKE_PGD, ALL))
def test_a_function_that_cannot_be_vmapped_works_on_the_whole_batch(name):
    x, y = examples_for(name)
    if name in FORWARDS:
        with pytest.raises(ValueError, match="singular_values and frobenius_norm do not"):
            ALL[name](exported(0), x, y, KEY)
        return
    found, expected = ALL[name](exported(0), x, y, KEY), plain(name)
    if name == "autoattack":
        found, expected = found.robust, expected.robust
    if name == "audit":
        found, expected = (
            {c.name: c.verdict for c in report.checks if c.name != "precision"}
            for report in (found, expected)
        )
        assert found == expected
        return
    chex_close(found, expected)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in FORWARDS])
def test_a_function_that_cannot_be_vmapped_works_within_the_callers_jit(name):
    call = jax.jit(functools.partial(FUNCTIONS[name], exported(0)))
    chex_close(call(*examples(), KEY), plain(name))
    if name == "pgd":
        chex_close(call(*on_mesh(AxisType.Explicit, *examples()), KEY), plain(name))


def test_an_operation_without_a_batching_rule_is_told_in_one_line():
    without_rule = core.Primitive("without_rule")
    without_rule.def_abstract_eval(lambda x: x)
    logits_fn = network(weights_of(0))
    with pytest.raises(ValueError, match="no rule for an operation of the network.*custom_vmap"):
        FUNCTIONS["square"](lambda x: logits_fn(without_rule.bind(x)), *examples(), KEY)


def test_a_function_that_cannot_be_vmapped_works_without_any_jit():
    with jax.disable_jit():
        found = FUNCTIONS["first_order"](exported(0), *examples(), KEY)
    chex_close(found, plain("first_order"))


# Meshes.

# The default kind of jax.make_mesh for every function, and the other kind for some.
EACH = [
    pytest.param(name, AxisType.Explicit, marks=pytest.mark.slow if name in LIKE_PGD else [])
    for name in FUNCTIONS
]
EACH += [(name, AxisType.Auto) for name in ("pgd", "square", "frobenius_norm", "first_order")]


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_sharded_examples_are_attacked_where_they_lie(name, kind):
    x, y = on_mesh(kind, *examples())
    found = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    chex_close(found, plain(name))
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(x.sharding, leaf.ndim)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_on_the_host_take_sharded_examples(name):
    rows = on_mesh(AxisType.Explicit, *examples_for(name))
    found = ALL[name](network(weights_of(0)), *rows, KEY)
    assert str(found) == str(plain(name))


def with_everything_on_a_mesh(name, kind):
    """The call within the caller's jit, and its arguments."""

    @jax.jit
    def run(weights, x, y):
        fn = jax.tree_util.Partial(lambda weights, x: network(weights)(x), weights)
        return FUNCTIONS[name](fn, x, y, KEY)

    return run, on_mesh(kind, *weights_of(0), axes=()), *on_mesh(kind, *examples())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_traced_within_the_callers_jit_with_everything_on_a_mesh(name):
    """Tracing alone shows whether the shardings of explicit axes fit."""
    run, *arguments = with_everything_on_a_mesh(name, AxisType.Explicit)
    found = jax.eval_shape(run, *arguments)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, plain(name))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", slow_but(("square", *KINDS), FUNCTIONS))
def test_works_within_the_callers_jit_with_everything_on_a_mesh(name, kind):
    run, *arguments = with_everything_on_a_mesh(name, kind)
    chex_close(run(*arguments), plain(name))


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("pgd", "square", "frobenius_norm", "minimum_norm"),
        ["pgd", "apgd", "fab", "square", "frobenius_norm", "spectral_norm", "first_order"]
        + ["clever", "oscillation", "minimum_norm"],
    ),
)
def test_works_within_the_callers_shard_map(name):
    f, (x, y) = network(weights_of(0)), examples()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("d")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
    )
    def on_each_device(x, y, keys):
        return FUNCTIONS[name](f, x, y, keys)

    found = jax.jit(on_each_device)(x, y, example_keys(KEY, len(x)))
    # Two examples at a time, not one as in a plain call, so matrix products round differently.
    np.testing.assert_allclose(found, plain(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_mesh_that_the_caller_has_set_changes_nothing(name):
    logits_fn, expected = network(weights_of(0)), plain(name)
    x, y = map(np.asarray, examples_for(name))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        jnp.zeros(())  # every call makes one, so it is compiled first
        with lowerings() as seen:
            found = ALL[name](logits_fn, x, y, KEY)
    assert not seen
    if name in LOOPS:
        assert str(found) == str(expected)
    else:
        chex_close(found, expected)

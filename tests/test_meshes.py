"""The front door on a mesh: examples, weights or the caller's program on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robust_jax import attacks
from robust_jax.devices.parallel import placement_of
from robust_jax.keys import example_keys
from tests.calls import ALL, FUNCTIONS, lowerings
from tests.small_networks import KEY, chex_close, examples, network, weights_of

KINDS = [AxisType.Auto, AxisType.Explicit]
# jax.make_mesh's own kind for every function, and the other for some.
EACH = [(name, AxisType.Explicit) for name in FUNCTIONS]
EACH += [(name, AxisType.Auto) for name in ("pgd", "square", "frobenius_norm", "first_order")]


def on_mesh(kind, *arrays, axes=("data",)):
    """The arrays on a mesh of eight devices, divided by their first axis or not at all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(*axes)))


def apply(weights, x):
    return network(weights)(x)


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_sharded_examples_are_attacked_where_they_lie(name, kind):
    x, y = examples()
    plain = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    x, y = on_mesh(kind, x, y)
    found = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    chex_close(found, plain)
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(x.sharding, leaf.ndim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [("d",), (("d", "m"),), ("d", None, "m"), (None, None, "m"), ()])
def test_the_result_is_divided_as_the_examples_are(axes, kind):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind,) * 2)
    x, y = examples()
    plain = attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    x_adv = attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_allclose(x_adv, plain, atol=1e-5)
    assert x_adv.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("name", ["autoattack", "audit"])
def test_loops_on_the_host_take_sharded_examples(name):
    x, y = examples()
    plain = ALL[name](network(weights_of(0)), x, y, KEY)
    found = ALL[name](network(weights_of(0)), *on_mesh(AxisType.Explicit, x, y), KEY)
    assert str(found) == str(plain)


def test_every_local_device_takes_its_share_and_the_result_is_on_one():
    x, y = examples(count=11)
    assert placement_of(np.asarray(x), 11).count == placement_of(None, 11).count == 8
    x_adv = attacks.pgd(network(weights_of(0)), np.asarray(x), y, KEY, eps=0.1, num_steps=2)
    assert x_adv.shape == x.shape and len(x_adv.sharding.device_set) == 1
    here = jax.device_put(x, jax.devices()[3])
    there = attacks.pgd(network(weights_of(0)), here, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_allclose(there, x_adv, atol=1e-6)
    assert there.sharding.device_set == {jax.devices()[3]}


@pytest.mark.parametrize(
    "name",
    ["pgd", "apgd", "fab", "square", "frobenius_norm", "spectral_norm", "first_order"]
    + ["clever", "oscillation", "minimum_norm"],
)
def test_works_within_the_callers_shard_map(name):
    x, y = examples(count=16)
    f = network(weights_of(0))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("d")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
    )
    def on_each_device(x, y, keys):
        return FUNCTIONS[name](f, x, y, keys)

    keys = example_keys(KEY, len(x))
    found = jax.jit(on_each_device)(jnp.asarray(x), jnp.asarray(y), keys)
    np.testing.assert_allclose(found, FUNCTIONS[name](f, x, y, keys), atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_mesh_that_the_caller_has_set_changes_nothing(name):
    x, y = map(np.asarray, examples())
    logits_fn = network(weights_of(0))
    plain = ALL[name](logits_fn, x, y, KEY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        jnp.zeros(())  # every call makes one
        with lowerings() as seen:
            found = ALL[name](logits_fn, x, y, KEY)
    assert not seen
    if name in ("autoattack", "audit"):
        assert str(found) == str(plain)
    else:
        chex_close(found, plain)


def test_what_a_plain_call_returns_can_be_used_on_any_mesh():
    x, y = map(np.asarray, examples())
    x_adv = attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2)
    assert not x_adv.committed
    for kind in KINDS:
        (there,) = on_mesh(kind, x)
        with jax.set_mesh(there.sharding.mesh):
            assert jnp.abs(x_adv - there).max() <= 0.1 + 1e-6


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_works_within_the_callers_jit_with_everything_on_a_mesh(name, kind):
    x, y = examples()
    plain = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    rows, weights = on_mesh(kind, x, y), on_mesh(kind, *weights_of(0), axes=())

    @jax.jit
    def run(weights, x, y):
        return FUNCTIONS[name](jax.tree_util.Partial(apply, weights), x, y, KEY)

    chex_close(run(weights, *rows), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_a_mesh_are_a_part_of_the_network_or_told(kind):
    x, y = examples()
    pgd = functools.partial(attacks.pgd, eps=0.1, num_steps=2)
    plain = pgd(network(weights_of(0)), x, y, KEY)
    rows = on_mesh(kind, x, y)
    for axes in ((), ("data",)):
        weights = (
            on_mesh(kind, weights_of(0)[0], axes=())[0],
            on_mesh(kind, weights_of(0)[1], axes=axes)[0],
        )
        found = pgd(jax.tree_util.Partial(apply, weights), *rows, KEY)
        np.testing.assert_allclose(found, plain, atol=1e-6)
    weights = on_mesh(kind, *weights_of(0), axes=())
    calls = {
        "pgd": lambda: pgd(network(weights), *rows, KEY),
        "autoattack": lambda: ALL["autoattack"](network(weights), x, y, KEY),
    }
    for name, call in calls.items():
        try:
            found = call()
        except ValueError as error:
            assert "a part of it: jax.tree_util.Partial(apply, weights)" in str(error)
        else:  # JAX 0.11 can do it, on automatic axes
            assert kind is AxisType.Auto
            if name == "pgd":
                np.testing.assert_allclose(found, plain, atol=1e-6)

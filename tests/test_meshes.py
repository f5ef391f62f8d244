"""The front door on a mesh: examples and weights on eight devices.

tests/test_functions.py calls every function on a mesh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robust_jax import attacks, margins
from robust_jax.analysis import features, surface
from robust_jax.devices.parallel import placement_of
from tests.calls import ALL
from tests.small_networks import KEY, chex_close, examples, network, on_mesh, weights_of

KINDS = [AxisType.Auto, AxisType.Explicit]


def apply(weights, x):
    return network(weights)(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [("d",), (("d", "m"),), ("d", None, "m"), (None, None, "m"), ()])
def test_the_result_is_divided_as_the_examples_are(axes, kind):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind,) * 2)
    x, y = examples()
    plain = attacks.fgsm(network(weights_of(0)), x, y, KEY, eps=0.1)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    x_adv = attacks.fgsm(network(weights_of(0)), x, y, KEY, eps=0.1)
    np.testing.assert_allclose(x_adv, plain, atol=1e-5)
    assert x_adv.sharding.is_equivalent_to(x.sharding, x.ndim)


ANALYSES = {
    "change": lambda x, key: features.change(lambda x: {"b": 2 * x, "a": x}, x, 0.9 * x),
    "point_at_distance": lambda x, key: features.point_at_distance(x, key, eps=0.1),
    "random_direction": lambda x, key: surface.random_direction(x, 0.9 * x, key),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_take_examples_on_a_mesh_and_legacy_keys(name, kind):
    x, _ = examples()
    plain = ANALYSES[name](x, KEY)
    (there,) = on_mesh(kind, x)
    found = ANALYSES[name](there, jax.random.PRNGKey(0))
    chex_close(found, plain)
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(there.sharding, leaf.ndim)


def test_every_local_device_takes_its_share_and_the_result_is_on_one():
    x, y = examples(count=11)
    assert placement_of(np.asarray(x), 11).count == placement_of(None, 11).count == 8
    shared = margins.first_order(network(weights_of(0)), np.asarray(x), y)
    assert shared.shape == (11,) and len(shared.sharding.device_set) == 1
    here = jax.device_put(x, jax.devices()[3])
    there = margins.first_order(network(weights_of(0)), here, y)
    np.testing.assert_allclose(there, shared, atol=1e-6)
    assert there.sharding.device_set == {jax.devices()[3]}
    with jax.default_device(jax.devices()[5]):
        chosen = margins.first_order(network(weights_of(0)), np.asarray(x), y)
    np.testing.assert_allclose(chosen, shared, atol=1e-6)
    assert chosen.sharding.device_set == {jax.devices()[5]}


def test_what_a_plain_call_returns_can_be_used_on_any_mesh():
    x, y = map(np.asarray, examples())
    x_adv = attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2)
    assert not x_adv.committed
    for kind in KINDS:
        (there,) = on_mesh(kind, x)
        with jax.set_mesh(there.sharding.mesh):
            assert jnp.abs(x_adv - there).max() <= 0.1 + 1e-6


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
            assert "part of the network: pass jax.tree_util.Partial(apply, weights)" in str(error)
        else:  # JAX 0.11 can do it, on automatic axes
            assert kind is AxisType.Auto
            if name == "pgd":
                np.testing.assert_allclose(found, plain, atol=1e-6)

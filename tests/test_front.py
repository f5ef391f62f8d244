"""The front door: which calls share a program, whatever their network, setting or criterion."""

import functools
import gc
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import _front, attacks, jacobian, losses, margins
from robust_jax._network import as_network
from robust_jax.batches import side_by_side
from tests.calls import ALL, FUNCTIONS, lowerings
from tests.small_networks import (
    KEY,
    NETWORKS,
    SHAPE,
    around,
    chex_close,
    examples,
    network,
    outside,
    straight_through,
    weights_of,
)


def test_a_criterion_may_compare_outputs_with_anything():
    x, _ = examples()
    f = network(weights_of(0))

    def moved(logits, reference):
        return jnp.abs(logits - reference).max(-1) > 0.5

    def distance(logits, reference):
        return jnp.abs(logits - reference).sum(-1)

    x_adv = attacks.pgd(f, x, f(x), KEY, eps=0.2, loss=distance, criterion=moved)
    assert moved(f(x_adv), f(x)).all()
    with pytest.raises(ValueError, match="has the label 9; the network has 4 classes"):
        attacks.pgd(f, x, jnp.full(len(x), 9), KEY, eps=0.2, criterion=attacks.misclassified)


def test_a_wrong_setting_spoils_no_later_call():
    x, y = examples()
    f = network(weights_of(0))
    for wrong in (2.0, "2"):
        with pytest.raises(ValueError, match=f"not {wrong!r}"):
            attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=wrong)
    plain = attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_array_equal(attacks.pgd(f, x, y, KEY, eps=0.1, num_steps=np.int64(2)), plain)

    def called(num_steps):
        overrides = {"apgd_ce": {"num_steps": num_steps}}
        return attacks.autoattack(
            f, x, y, KEY, eps=0.1, version=("apgd_ce",), overrides=overrides, progress=False
        )

    with pytest.raises(ValueError, match="not 3.0"):
        called(3.0)
    np.testing.assert_array_equal(called(np.int64(3)).x_adv, called(3).x_adv)


def test_settings_made_again_are_the_same_program():
    x, y = examples()

    def smoothed(amount):
        loss = functools.partial(losses.cross_entropy, label_smoothing=amount)
        return attacks.pgd(network(weights_of(0)), x, y, KEY, eps=0.1, num_steps=2, loss=loss)

    def nearest(num_steps):
        attack = functools.partial(attacks.deepfool, num_steps=num_steps)
        return margins.minimum_norm(network(weights_of(0)), x, y, KEY, attack=attack)

    for call, settings in ((smoothed, (0.1, 0.9)), (nearest, (1, 2))):
        one, other = (np.asarray(call(setting)) for setting in settings)
        assert (one != other).any()
        with lowerings() as seen:
            for setting, expected in zip(settings, (one, other), strict=True):
                np.testing.assert_array_equal(call(setting), expected)
        assert not seen


def test_a_custom_vjp_around_weights_is_compiled_once():
    x, y = examples()

    def made(weights):
        @jax.custom_vjp
        def logits_fn(x):
            return x.reshape(len(x), -1) @ weights

        def pull(shape, cotangent):
            return ((cotangent @ weights.T).reshape(shape),)

        logits_fn.defvjp(lambda x: (logits_fn(x), x.shape), pull)
        return logits_fn

    one, other = (jax.random.normal(jax.random.key(seed), (12, 4)) for seed in (0, 1))
    first = attacks.fgsm(made(one), x, y, KEY, eps=0.1)
    with lowerings() as seen:
        np.testing.assert_array_equal(attacks.fgsm(made(one), x, y, KEY, eps=0.1), first)
    assert not seen
    second = attacks.fgsm(made(other), x, y, KEY, eps=0.1)
    expected = attacks.fgsm(lambda x: x.reshape(len(x), -1) @ other, x, y, KEY, eps=0.1)
    chex_close(second, expected)


def test_a_programs_size_does_not_grow_with_the_network():
    sizes = []
    for width in (8, 512):
        weights = (jnp.ones((12, width)), jnp.ones((width, 4)))
        found = as_network(network(weights), SHAPE, jnp.float32)
        text = jax.jit(lambda f, x: f(x)).lower(found, jnp.ones((6, *SHAPE))).as_text()
        sizes.append(len(text))
    assert sizes[1] < 1.1 * sizes[0]


def test_programs_are_kept_a_bounded_number_of_them(monkeypatch):
    from robust_jax import _front, _network

    kept = (_front._program, _front._rows_program, _network._known)
    assert {cache.cache_info().maxsize for cache in kept} == {_network.MOST_PROGRAMS}
    small = functools.lru_cache(2)(_front._program.__wrapped__)
    monkeypatch.setattr(_front, "_program", small)
    x, y = examples()
    for factor in (1.0, 2.0, 3.0, 4.0):  # four programs
        jacobian.frobenius_norm(lambda x, factor=factor: factor * network(weights_of(0))(x), x)
    assert small.cache_info().currsize == 2 and small.cache_info().misses == 4


def test_batches_on_one_cpu_run_side_by_side_in_the_callers_modes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    threads = set()

    def spied(run, parts, most):
        def noted(part):
            threads.add(threading.get_ident())
            return run(part)

        return side_by_side(noted, parts, most)

    monkeypatch.setattr(_front, "side_by_side", spied)
    x, y = examples(0, 48)
    on_all = ALL["autoattack"](network(weights_of(0)), x, y, KEY)
    assert not threads
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    on_one = ALL["autoattack"](network(weights_of(0)), x, y, KEY)
    assert threads and threading.get_ident() not in threads
    np.testing.assert_array_equal(on_one.broken_by, on_all.broken_by)
    chex_close(on_one.x_adv, on_all.x_adv)
    with jax.enable_x64(True):
        double = ALL["autoattack"](network(weights_of(0)), np.asarray(x, np.float64), y, KEY)
    assert double.x_adv.dtype == np.float64
    assert ALL["audit"](network(weights_of(0)), x, y, KEY).num_examples == 48  # partly in float64
    another = network(weights_of(1)), *examples(1, 48), jax.random.key(1)
    with lowerings() as seen:
        for name in ("autoattack", "audit"):
            ALL[name](*another)
    assert not seen
    threads.clear()
    with jax.debug_nans(True):
        ALL["autoattack"](network(weights_of(0)), x, y, KEY)
    few = {"version": ("square",), "overrides": {"square": {"num_queries": 2}}}
    attacks.autoattack(outside(), x, y, KEY, eps=0.1, progress=False, **few)
    assert not threads


def test_memory_does_not_grow_with_calls():
    x, y = examples()
    weights, keys = weights_of(0), list(jax.random.split(KEY, 100))

    def objects_after(keys):
        for i, key in enumerate(keys):
            scaled = [(1 + i / 100) * w for w in weights]
            attacks.fgsm(network(scaled), x, y, key, eps=0.1)
        del scaled
        gc.collect()
        return len(gc.get_objects()), len(jax.live_arrays())

    before = objects_after(keys[:50])
    after = objects_after(keys[50:])
    assert after[0] < before[0] + 25 and after[1] <= before[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_compiled_once_however_it_is_written(name):
    x, _ = examples()
    make = NETWORKS[name]
    y = jnp.argmax(make(0)(x), -1)
    first = attacks.fgsm(make(0), x, y, KEY, eps=0.1)
    other, same = make(1), make(0)
    with lowerings() as seen:
        second = attacks.fgsm(other, x, y, KEY, eps=0.1)
        again = attacks.fgsm(same, x, y, KEY, eps=0.1)
        assert not seen
    expected = jax.jit(lambda x, y: attacks.fgsm(other, x, y, KEY, eps=0.1))(x, y)
    np.testing.assert_allclose(second, expected, atol=1e-5)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def test_what_a_function_refers_to_may_change():
    x, y = examples()
    weights = weights_of(0)

    def logits_fn(x):
        return network(weights)(x)

    before = attacks.pgd(logits_fn, x, y, KEY, eps=0.1, num_steps=2)
    weights = weights_of(1)
    after = attacks.pgd(logits_fn, x, y, KEY, eps=0.1, num_steps=2)
    expected = attacks.pgd(network(weights_of(1)), x, y, KEY, eps=0.1, num_steps=2)
    np.testing.assert_array_equal(after, expected)
    assert (before != after).any()


def backwards(scale):
    fn = jax.custom_vjp(lambda x: x)
    fn.defvjp(lambda x: (x, None), lambda _, g: (scale * g,))
    return fn


def with_the_gradient(scale):
    return jax.custom_gradient(lambda x: (x, lambda g: (scale * g,)))


def forwards(scale):  # around a function of JAX, like the next one
    fn = jax.custom_jvp(jax.nn.relu)
    fn.defjvp(lambda primals, tangents: (jax.nn.relu(*primals), scale * tangents[0]))
    return fn


def by_argument(scale):
    fn = jax.custom_jvp(jax.nn.relu)
    fn.defjvps(lambda tangent, out, x: scale * tangent)
    return fn


@pytest.mark.parametrize("made", [backwards, with_the_gradient, forwards, by_argument])
def test_functions_that_differ_in_a_derivative_alone_are_two(made):
    x, y = examples()

    def scaled(scale):
        return lambda x: made(scale)(network(weights_of(0))(x))

    up, down = (attacks.fgsm(scaled(s), x, y, KEY, eps=0.1) for s in (1.0, -1.0))
    assert (up != down).any()


def test_weights_within_a_custom_gradient_are_those_of_the_call():
    x, y = examples()

    def made(weights):
        return jax.custom_gradient(
            lambda x: (
                x.reshape(len(x), -1) @ weights,
                lambda g: ((g @ weights.T).reshape(x.shape),),
            )
        )

    for seed in (0, 1):
        weights = jax.random.normal(jax.random.key(seed), (12, 4))
        expected = attacks.fgsm(lambda x, w=weights: x.reshape(len(x), -1) @ w, x, y, KEY, eps=0.1)
        chex_close(attacks.fgsm(made(weights), x, y, KEY, eps=0.1), expected)


def test_more_outputs_than_inputs_and_a_derivative_backwards_alone():
    weights = jax.random.normal(KEY, (3, 5))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32)
    narrow = jax.export.export(jax.jit(lambda x: x @ weights))(rows)
    for fn in (lambda x: narrow.call(x), around(lambda x: x @ weights, straight_through)):
        found = jacobian.jacobian(fn, jnp.full((2, 3), 0.5))
        chex_close(found, jnp.broadcast_to(weights.T, (2, 5, 3)))


def test_a_network_outside_jax_is_attacked_by_its_outputs_alone():
    x, y = examples()
    chex_close(
        FUNCTIONS["square"](outside(), x, y, KEY),
        FUNCTIONS["square"](network(weights_of(0)), x, y, KEY),
    )
    for name in ("pgd", "frobenius_norm", "first_order", "autoattack", "audit"):
        with pytest.raises(ValueError, match="has no gradient there: attacks.square needs none"):
            ALL[name](outside(), x, y, KEY)

"""Keys of any kind, logits that are not finite and batches too large are taken or warned of.

Keys for every function: tests/test_functions.py; without jit: tests/test_modes_library.py.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import _outputs, attacks, losses, margins
from robust_jax._outputs import are_probabilities
from tests.calls import ATTACKS, EPS, FUNCTIONS, autoattack
from tests.small_networks import KEY, chex_close, examples, network, weights_of


@pytest.mark.parametrize("name", ["mean_square", "spectral_norm", "pgd", "square"])
@pytest.mark.parametrize("count", [2, 8])
def test_legacy_keys_are_taken_within_the_callers_jit_too(name, count):
    x, y = examples(count=count)
    call = functools.partial(FUNCTIONS[name], network(weights_of(0)), x, y)
    plain, legacy = call(KEY), jax.random.PRNGKey(0)
    chex_close(jax.jit(call)(legacy), plain)
    chex_close(call(legacy), plain)


@pytest.mark.parametrize("name", ["gaussian_noise", "mean_square", "spectral_norm"])
def test_an_example_draws_the_same_beside_any_neighbours(name):
    """On one device, where keys of "rbg" under vmap would all draw as the first one does."""
    x, y = examples()
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(x))
    call = jax.jit(functools.partial(FUNCTIONS[name], network(weights_of(0))))
    found, turned = call(x, y, keys), call(x[::-1], y[::-1], keys[::-1])
    np.testing.assert_allclose(turned[::-1], found, rtol=1e-5)


def test_a_randomised_network_takes_keys_of_another_implementation():
    x, y = examples()

    def logits_fn(x, key):
        return network(weights_of(0))(x) + jax.random.normal(key, (len(x), 4))

    # With the same loss the two members share a program.
    few = {"num_steps": 2, "eot_samples": 2, "loss": losses.cross_entropy}
    found = attacks.autoattack(
        logits_fn,
        x,
        y,
        jax.random.key(0, impl="rbg"),
        eps=0.1,
        version="rand",
        overrides=dict.fromkeys(("apgd_ce", "apgd_dlr"), few),
        progress=False,
    )
    assert found.x_adv.shape == x.shape


def with_a_class_at(logit):
    """A network whose last class has the same logit everywhere: any logit shares a program."""
    logit = jnp.float32(logit)
    return lambda x: jnp.where(jnp.arange(4) == 3, logit, network(weights_of(0))(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_probabilities_are_known_in_any_precision(dtype):
    logits = 3 * jax.random.normal(jax.random.key(0), (50, 100), dtype)
    assert are_probabilities(np.asarray(jax.nn.softmax(logits)))
    assert not are_probabilities(np.asarray(jax.nn.softmax(logits) * 0.9))
    assert not are_probabilities(np.asarray(logits))


def test_logits_that_are_not_finite_or_depend_on_the_batch_are_warned_of():
    x, y = examples()
    f = network(weights_of(0))
    masked = autoattack(with_a_class_at(-np.inf), x, y % 3, KEY)
    assert "8 of 8 points have logits of -inf" in masked.warnings[0]
    broken = autoattack(with_a_class_at(np.nan), x, y % 3, KEY)
    assert "8 of 8 points have logits that are NaN" in broken.warnings[0]
    inside = 0.2 + 0.6 * jnp.asarray(x)
    low, high = inside.min(), inside.max()

    def with_a_hole(z):  # only off the images, where attacks lead
        outside = ((z < low) | (z > high)).reshape(len(z), -1).any(-1)
        return jnp.where(outside[:, None], jnp.nan, f(z))

    found = autoattack(with_a_hole, inside, f(inside).argmax(-1), KEY)
    assert not found.robust.all() and any("attacks led" in line for line in found.warnings)
    few = {"version": ("apgd_ce",), "overrides": {"apgd_ce": {"num_steps": 2}}}
    whole = attacks.autoattack(
        lambda x: f(x) - f(x).mean(0), x, y, KEY, eps=0.05, progress=False, **few
    )
    assert any("alone in its batch" in warning for warning in whole.warnings)
    images = np.asarray(x)
    for count in (1, 8):
        assert _outputs.change_with_the_batch(lambda x: f(x) - f(x).mean(0), images[:count]) > 0.1
        assert _outputs.change_with_the_batch(f, images[:count]) < 1e-5


def examples_of_three_classes():
    x, _ = examples(count=16)
    return x, network(weights_of(0))(x)[:, :3].argmax(-1)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("jsma", "apgd_targeted")])
def test_a_class_that_is_ruled_out_protects_nobody(name):
    # Its logit is -inf. The targeted DLR loss has no value there, and AutoAttack says so.
    x, y = examples_of_three_classes()
    ruled_out, never_first = (
        float((network(weights_of(0))(moved)[:, :3].argmax(-1) != y).mean())
        for moved in (FUNCTIONS[name](with_a_class_at(z), x, y, KEY) for z in (-np.inf, -1e3))
    )
    assert ruled_out >= never_first - 0.2


@pytest.mark.parametrize("name", [n for n in ATTACKS if n != "apgd_targeted"])
def test_logits_that_are_nan_move_nothing_out_of_the_ball(name):
    x, y = examples_of_three_classes()
    eps = EPS.get(name, 0.1)
    norm = {"jsma": 0, "carlini_wagner": 2}.get(name, np.inf)
    x_adv = FUNCTIONS[name](with_a_class_at(np.nan), x, y, KEY)
    assert np.isfinite(x_adv).all() and (x_adv >= 0).all() and (x_adv <= 1).all()
    sizes = np.linalg.norm((x_adv - x).reshape(len(x), -1), norm, axis=-1)
    assert (sizes <= eps + 1e-6).all()


def test_a_class_that_is_ruled_out_is_no_boundary():
    x, y = examples_of_three_classes()
    ruled_out = with_a_class_at(-np.inf)
    assert not attacks.is_adversarial(ruled_out, x, y).any()
    np.testing.assert_allclose(
        margins.first_order(ruled_out, x, y),
        margins.first_order(lambda x: network(weights_of(0))(x)[:, :3], x, y),
        rtol=1e-5,
    )


def test_a_batch_too_large_for_memory_is_halved_with_a_warning(monkeypatch):
    from robust_jax import _front

    x, y = examples(count=32)
    real, sizes = _front._rows_program, []

    def small(*arguments):
        run = real(*arguments)

        def limited(network, rows, scalars):
            sizes.append(len(rows["x"]))
            if len(rows["x"]) > 8:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return run(network, rows, scalars)

        return limited

    def attack():
        return attacks.autoattack(
            network(weights_of(0)),
            x,
            y,
            KEY,
            eps=0.05,
            batch_size=32,
            version=("apgd_ce",),
            progress=False,
        )

    expected = attack()
    monkeypatch.setattr(_front, "_rows_program", small)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attack()
    np.testing.assert_array_equal(found.broken_by, expected.broken_by)
    told = [str(warning.message) for warning in caught]
    assert [text.partition(";")[2] for text in told] == [
        " continuing with 16",
        " continuing with 8",
    ]
    assert sizes[-1] == 8


@pytest.mark.parametrize("name", ["pgd", "frobenius_norm", "square"])
def test_arrays_in_the_other_byte_order_are_taken(name):
    x, y = (np.asarray(a) for a in examples())
    swapped = (a.astype(a.dtype.newbyteorder(">")) for a in (x, y))
    found = FUNCTIONS[name](network(weights_of(0)), *swapped, KEY)
    chex_close(found, FUNCTIONS[name](network(weights_of(0)), x, y, KEY))


@pytest.mark.parametrize(
    ("attack", "keyword"),
    [(attacks.pgd, "momentum"), (attacks.apgd, "rho"), (attacks.jsma, "theta")],
)
def test_a_setting_may_be_a_number_in_an_array(attack, keyword):
    x, y = examples()
    few = {} if attack is attacks.jsma else {"num_steps": 2}
    for half in (np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        found = attack(network(weights_of(0)), x, y, KEY, eps=2, **few, **{keyword: half})
        plain = attack(network(weights_of(0)), x, y, KEY, eps=2, **few, **{keyword: 0.5})
        np.testing.assert_array_equal(found, plain)

"""Keys of any kind, logits that are not finite, batches too large: taken, or warned of."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_jax
from robust_jax import attacks, margins
from robust_jax.keys import example_keys
from tests.calls import (
    ALL,
    ATTACKS,
    FUNCTIONS,
    KEYLESS_NORMS,
    WITHOUT_KEY,
    autoattack,
)
from tests.small_networks import (
    KEY,
    chex_close,
    examples,
    network,
    weights_of,
)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in KEYLESS_NORMS])
def test_legacy_keys_lists_and_numpy_are_taken(name):
    x, y = examples()
    plain = FUNCTIONS[name](network(weights_of(0)), x, y, KEY)
    other = FUNCTIONS[name](
        network(weights_of(0)), np.asarray(x), list(map(int, y)), jax.random.PRNGKey(0)
    )
    chex_close(other, plain)


@pytest.mark.parametrize("name", ["pgd", "spectral_norm"])
@pytest.mark.parametrize("count", [2, 8])
def test_legacy_keys_are_taken_within_the_callers_jit_too(name, count):
    x, y = examples(count=count)
    call = functools.partial(FUNCTIONS[name], network(weights_of(0)), x, y)
    plain, legacy = call(KEY), jax.random.PRNGKey(0)
    chex_close(jax.jit(call)(legacy), plain)
    chex_close(call(legacy), plain)
    with jax.disable_jit():
        chex_close(call(legacy), plain)
        x, y = np.asarray(x), list(map(int, y))
        chex_close(FUNCTIONS[name](network(weights_of(0)), x, y, legacy), plain)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_KEY])
def test_keys_of_another_implementation_are_taken(name):
    x, y = examples()
    key = jax.random.key(0, impl="rbg")
    found = ALL[name](network(weights_of(0)), x, y, key)
    keys = ALL[name](network(weights_of(0)), x, y, example_keys(key, len(x)))
    assert jax.tree.structure(found) == jax.tree.structure(keys)
    if name not in ("autoattack", "audit"):
        chex_close(found, keys)


def test_an_evaluation_takes_keys_of_another_implementation_and_tells_of_logits_that_are_nan():
    x, y = examples()
    is_broken = x.mean((1, 2, 3)) > 0.5

    def logits_fn(x):
        broken = x.mean((1, 2, 3))[:, None] > 0.5
        return jnp.where(broken, jnp.nan, network(weights_of(0))(x))

    found = robust_jax.evaluate(
        logits_fn,
        x,
        y,
        jax.random.key(0, impl="rbg"),
        eps=0.1,
        version=("apgd_ce",),
        overrides={"apgd_ce": {"num_steps": 2}},
        num_audited=0,
        progress=False,
    )
    assert 0 < found.clean_accuracy == 1 - is_broken.mean()
    many = f"{is_broken.sum()} of 8 points have logits that are NaN"
    assert found.warnings[0].startswith(many)


def test_a_randomised_network_takes_keys_of_another_implementation():
    x, y = examples()

    def logits_fn(x, key):
        return network(weights_of(0))(x) + jax.random.normal(key, (len(x), 4))

    found = attacks.autoattack(
        logits_fn,
        x,
        y,
        jax.random.key(0, impl="rbg"),
        eps=0.1,
        version="rand",
        overrides=dict.fromkeys(("apgd_ce", "apgd_dlr"), {"num_steps": 2, "eot_samples": 2}),
        progress=False,
    )
    assert found.x_adv.shape == x.shape


def test_logits_that_are_not_finite_or_depend_on_the_batch_are_warned_of():
    x, y = examples()
    f = network(weights_of(0))
    masked = autoattack(lambda x: jnp.where(jnp.arange(4) == 3, -jnp.inf, f(x)), x, y % 3, KEY)
    assert "8 of 8 points have logits of -inf" in masked.warnings[0]
    broken = autoattack(lambda x: jnp.where(jnp.arange(4) == 3, jnp.nan, f(x)), x, y % 3, KEY)
    assert "8 of 8 points have logits that are NaN" in broken.warnings[0]
    inside = 0.2 + 0.6 * jnp.asarray(x)
    low, high = inside.min(), inside.max()

    def with_a_hole(z):  # off the images only, where attacks lead
        outside = ((z < low) | (z > high)).reshape(len(z), -1).any(-1)
        return jnp.where(outside[:, None], jnp.nan, f(z))

    found = autoattack(with_a_hole, inside, f(inside).argmax(-1), KEY)
    assert not found.robust.all() and any("attacks led" in line for line in found.warnings)
    whole = autoattack(lambda x: f(x) - f(x).mean(0), x, y, KEY)
    assert any("alone in its batch" in warning for warning in whole.warnings)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("jsma", "apgd_targeted")])
def test_a_class_that_is_ruled_out_protects_nobody(name):
    # Its logit is -inf. The targeted DLR loss has no value there, and AutoAttack says so.
    x, _ = examples(count=16)
    f = network(weights_of(0))
    y = f(x)[:, :3].argmax(-1)

    def ruled_out(x):
        return jnp.where(jnp.arange(4) == 3, -jnp.inf, f(x))

    def plain(x):
        return f(x)[:, :3]

    broken = [
        float((plain(FUNCTIONS[name](fn, x, y, KEY)).argmax(-1) != y).mean())
        for fn in (ruled_out, plain)
    ]
    assert broken[0] >= broken[1] - 0.2, broken
    assert not attacks.is_adversarial(ruled_out, x, y).any()
    np.testing.assert_allclose(
        margins.first_order(ruled_out, x, y), margins.first_order(plain, x, y), rtol=1e-5
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

"""The audit flags networks that mask their gradients, by the right check, and no honest one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import audit, losses
from robust_jax._audit import _Lab
from robust_jax._double import NotInDouble, in_double
from robust_jax._front import Mapper
from robust_jax._network import as_network
from tests.digits import EPS, test_points, trained
from tests.small_networks import NETWORKS, convolution, examples, repeated, weights_of

KEY = jax.random.key(0)
QUICKLY = {"num_queries": 5, "progress": False}


@functools.cache
def surrogate():
    return trained("standard", seed=1)


def look(logits_fn, **keywords):
    x, y = test_points()
    return audit(
        logits_fn,
        x,
        y,
        KEY,
        **{
            "eps": EPS,
            "surrogates": {"undefended": surrogate()},
            "num_queries": 300,
            "batch_size": 200,
            "progress": False,
            **keywords,
        },
    )


def quantised(x):
    return jnp.round(x * 4) / 4


def shattered(x):
    return x + 0.02 * jnp.sin(2000 * x)


def decoy(x):
    """The true logits without their gradient, plus a whisper that has one."""
    direction = jax.random.normal(jax.random.key(7), (64, 10))
    return jax.lax.stop_gradient(trained()(x)) + 1e-3 * x.reshape(x.shape[0], -1) @ direction


def normalised_by_batch(x):
    logits = trained()(x)
    return (logits - logits.mean(0)) / (logits.std(0) + 1e-3)


def noisy(rng, x):
    return trained()(x) + jnp.asarray(rng.normal(size=(1, 10)), jnp.float32)


MASKED = {
    "hot logits": (lambda x: 1e4 * trained()(x), {"gradients", "losses"}),
    "quantised input": (lambda x: trained()(quantised(x)), {"gradients", "radius", "square"}),
    "stopped gradient": (lambda x: jax.lax.stop_gradient(trained()(x)), {"gradients", "radius"}),
    "decoy gradient": (decoy, {"square", "transfer"}),
    "shattered input": (lambda x: trained()(shattered(x)), {"transfer"}),
    "probabilities": (lambda x: jax.nn.softmax(trained()(x)), {"outputs"}),
    "batch statistics": (normalised_by_batch, {"batch"}),
    "random outputs": (functools.partial(noisy, np.random.default_rng(0)), {"randomness"}),
    "not a number": (
        lambda x: jnp.where(x.mean((1, 2, 3))[:, None] > 0.33, jnp.nan, trained()(x)),
        {"outputs"},
    ),
    "root at zero": (lambda x: trained()(jnp.sqrt(x) ** 2), {"gradients"}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_networks_are_flagged_by_the_right_check(name):
    trained()  # before anything is traced
    logits_fn, expected = MASKED[name]
    result = look(logits_fn)
    failed = {check.name for check in result.checks if check.verdict == "fail"}
    assert result.verdict == "fail"
    assert expected <= failed, result.checks


@pytest.mark.parametrize(
    ("method", "norm", "eps"),
    [
        ("standard", "linf", EPS),
        ("adversarial", "linf", EPS),
        ("trades", "linf", EPS),
        ("standard", "linf", EPS / 4),
        ("adversarial", "l2", 0.5),
    ],
)
def test_honest_networks_pass(method, norm, eps):
    result = look(trained(method), norm=norm, eps=eps, training_loss=losses.cross_entropy)
    flagged = [check for check in result.checks if check.verdict != "pass"]
    assert result.verdict == "pass", flagged
    assert result.num_examples > 150


@pytest.mark.parametrize("mapped", [False, True])
def test_saturation_in_float32_is_found_by_float64(mapped):
    trained()  # before anything is traced

    def logits_fn(x):  # its gap is beyond float32's softmax and within float64's
        return 40 * trained()(x)

    x, _ = test_points()
    mapping = {"map_examples": Mapper(as_network(logits_fn, x.shape[1:], x.dtype), 200)}
    result = look(logits_fn, **(mapping if mapped else {}))
    check = next(check for check in result.checks if check.name == "precision")
    assert check.verdict == "fail", check
    assert check.values["float64"] < check.values["float32"] - 0.2


@pytest.mark.parametrize("name", ["lax convolution", "equinox", "nnx"])
def test_a_convolution_that_does_not_follow_the_type_of_its_input_runs_in_float64(name):
    logits_fn, (x, _) = NETWORKS[name](0), examples()
    with jax.enable_x64(True):
        double = in_double(logits_fn, x.shape[1:])(jnp.asarray(x, jnp.float64))
    assert double.dtype == jnp.float64
    np.testing.assert_allclose(double, logits_fn(x), atol=1e-4)
    report = audit(logits_fn, x, logits_fn(x).argmax(-1), KEY, eps=0.01, **QUICKLY)
    assert {c.name: c.verdict for c in report.checks}["precision"] == "pass"


def test_what_cannot_run_in_float64_is_skipped_and_says_why():
    x, y = examples()
    looped = repeated(convolution(0))
    report = audit(looped, x, looped(x).argmax(-1), KEY, eps=0.01, **QUICKLY)
    check = next(check for check in report.checks if check.name == "precision")
    assert check.verdict == "skipped" and "contains a scan" in check.evidence

    def reads_bits(x):  # of numbers of 32 bits alone
        is_positive = jax.lax.bitcast_convert_type(x, jnp.int32) >= 0
        return (is_positive * x).reshape(len(x), -1)[:, :4]

    with jax.enable_x64(True), pytest.raises(NotInDouble, match="does not take other types"):
        in_double(reads_bits, x.shape[1:])
    rows = x.reshape(len(x), -1)
    report = audit(lambda x: x @ weights_of(0)[0], rows, y, KEY, eps=0.01, **QUICKLY)
    check = next(check for check in report.checks if check.name == "square")
    assert check.verdict == "skipped" and "need images" in check.evidence


def test_a_share_is_judged_by_the_lower_end_of_its_interval():
    rows = {"x": np.zeros((200, 4), np.float32), "y": np.zeros(200, np.int32)}
    run = lambda attack: lambda rows, *_: np.ones(len(rows["y"]), bool)  # noqa: E731
    lab = _Lab(run, None, rows, np.eye(4, dtype=np.float32)[rows["y"]], 0.1, "linf", None)
    grades = [lab.grade(count / 200, (0.01, 0.05)) for count in (2, 4, 8, 15, 25)]
    assert grades == ["pass", "pass", "warn", "warn", "fail"]


def test_without_a_surrogate_transfer_is_skipped_and_mistakes_are_told():
    x, y = test_points()
    result = look(trained(), surrogates={}, eps=0.01)
    assert {c.name: c.verdict for c in result.checks}["transfer"] == "skipped"
    assert result.verdict == "pass"
    with pytest.raises(ValueError, match="eps must be above 0, not 0"):
        audit(trained(), x, y, KEY, eps=0)
    with pytest.raises(ValueError, match="none of the 200 examples is classified correctly"):
        audit(lambda x: trained()(x)[:, ::-1] * 0 - jnp.arange(10), x, y * 0 + 9, KEY, eps=0.1)


def test_a_loss_it_was_trained_to_be_flat_in_is_named():
    logits_fn = trained()
    result = look(logits_fn, eps=0.15, training_loss=lambda z, y: 0 * losses.cross_entropy(z, y))
    check = next(check for check in result.checks if check.name == "losses")
    assert check.verdict == "warn"
    assert "the loss it was trained with is the weak attack" in check.evidence


def test_networks_may_lie_on_one_device_where_there_are_several():
    here = jax.device_put(jax.random.normal(KEY, (64, 10)), jax.devices()[0])
    result = look(
        lambda x: x.reshape(len(x), -1) @ here,
        surrogates={"the same": lambda x: x.reshape(len(x), -1) @ (2 * here)},
        eps=0.01,
        num_queries=10,
    )
    assert jax.device_count() == 8
    assert {c.name: c.verdict for c in result.checks}["transfer"] != "skipped"

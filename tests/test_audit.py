"""The audit flags networks that mask their gradients, by the right check, and no honest one.

tests/test_modes.py runs it on eight devices, in every dtype and with keys of any kind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import attacks, audit, losses
from robust_jax._audit import CHECKS, _Attack, _check_losses, _Lab
from robust_jax._double import NotInDouble, in_double
from robust_jax._front import Mapper
from robust_jax._network import as_network
from tests.digits import EPS, test_points, trained
from tests.small_networks import NETWORKS, examples, repeated, weights_of

KEY = jax.random.key(0)
# A norm record of the caller's, for which Square cannot draw patches.
MINE = dataclasses.replace(attacks.NORMS["l2"], name="mine", patches=None)
QUICKLY = {"num_queries": 5, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Uses one device, since an audit on eight takes several times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


def standard(seed=0):
    return trained("standard", seed=seed, steps=200)


def look(logits_fn, **keywords):
    """An audit in batches of one size, so that networks of one program share its programs."""
    x, y = test_points(120)
    mapper = Mapper(as_network(logits_fn, x.shape[1:], x.dtype), len(x), len(x))
    settings = {
        "eps": EPS,
        "surrogates": {"undefended": standard(1)},
        "training_loss": losses.cross_entropy,
        "num_queries": 300,
        "batch_size": len(x),  # for the float64 pass
        "map_examples": mapper,
        "progress": False,
    }
    return audit(logits_fn, x, y, KEY, **{**settings, **keywords})


DIRECTION = np.random.default_rng(7).normal(size=(64, 10)).astype(np.float32)
NOISE = np.random.default_rng(0)


def decoy(logits, x, noise):
    """The true logits without their gradient, plus a whisper that has one."""
    return jax.lax.stop_gradient(logits) + 1e-3 * x.reshape(len(x), -1) @ DIRECTION


def normalised_by_batch(logits, x, noise):
    return (logits - logits.mean(0)) / (logits.std(0) + 1e-3)


def not_a_number(logits, x, noise):
    return jnp.where(x.mean((1, 2, 3))[:, None] > 0.33, jnp.nan, logits)


# What is done to the images, and to the logits (given images and noise).
BEFORE = {
    "nothing": lambda x: x,
    "quantised": lambda x: jnp.round(x * 4) / 4,
    "shattered": lambda x: x + 0.02 * jnp.sin(2000 * x),
    "root at zero": lambda x: jnp.sqrt(x) ** 2,
}
AFTER = {
    "nothing": lambda logits, x, noise: logits,
    "hot": lambda logits, x, noise: 1e4 * logits,
    # A gap too wide for float32's softmax and not for float64's.
    "warm": lambda logits, x, noise: 40 * logits,
    "stopped gradient": lambda logits, x, noise: jax.lax.stop_gradient(logits),
    "decoy gradient": decoy,
    "probabilities": lambda logits, x, noise: jax.nn.softmax(logits),
    "batch statistics": normalised_by_batch,
    "random": lambda logits, x, noise: logits + noise,
    "not a number": not_a_number,
}
MASKED = {
    "hot logits": ("nothing", "hot", {"gradients", "losses"}),
    "warm logits": ("nothing", "warm", {"precision"}),
    "quantised input": ("quantised", "nothing", {"gradients", "radius", "square"}),
    "stopped gradient": ("nothing", "stopped gradient", {"gradients", "radius"}),
    "decoy gradient": ("nothing", "decoy gradient", {"square", "transfer"}),
    "shattered input": ("shattered", "nothing", {"transfer"}),
    "probabilities": ("nothing", "probabilities", {"outputs"}),
    "batch statistics": ("nothing", "batch statistics", {"batch"}),
    "random outputs": ("nothing", "random", {"randomness"}),
    "not a number": ("nothing", "not a number", {"outputs"}),
    "root at zero": ("root at zero", "nothing", {"gradients"}),
}


def switched(network, before="nothing", after="nothing"):
    """One program for all networks, which takes the choices of BEFORE and AFTER as arguments."""
    which_before, which_after = (
        jnp.asarray([*table].index(one)) for table, one in ((BEFORE, before), (AFTER, after))
    )

    def logits_fn(x):
        noise = jnp.asarray(NOISE.normal(size=(1, 10)), jnp.float32)
        logits = network(jax.lax.switch(which_before, [*BEFORE.values()], x))
        return jax.lax.switch(which_after, [*AFTER.values()], logits, x, noise)

    return logits_fn


@pytest.mark.parametrize("name", MASKED)
def test_masked_networks_are_flagged_by_the_right_check(name):
    *masks, flags = MASKED[name]
    result = look(switched(standard(), *masks))
    assert tuple(check.name for check in result.checks) == CHECKS
    failed = {check.name for check in result.checks if check.verdict == "fail"}
    assert result.verdict == "fail"
    assert flags <= failed, result.checks


@pytest.mark.parametrize(
    ("method", "norm", "eps"),
    [
        ("standard", "linf", EPS),
        ("adversarial", "linf", EPS),
        ("trades", "linf", EPS),
        ("standard", "linf", EPS / 4),
        ("adversarial", MINE, 0.5),
    ],
)
def test_honest_networks_pass(method, norm, eps):
    network = trained(method, steps=200)
    # Another norm is another program anyway, so its network is passed as it is.
    result = look(network if norm is MINE else switched(network), norm=norm, eps=eps)
    flagged = [check for check in result.checks if check.verdict != "pass"]
    assert result.verdict == "pass", flagged
    assert [check.name for check in flagged] == (["square"] if norm is MINE else [])
    assert result.num_examples > 100
    assert result.norm == (norm if isinstance(norm, str) else norm.name)


CONVOLUTIONS = ("lax convolution", "equinox", "nnx")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_does_not_follow_the_type_of_its_input_runs_in_float64(name):
    logits_fn, (x, _) = NETWORKS[name](0), examples()
    y = logits_fn(x).argmax(-1)
    with jax.enable_x64(True):
        network, wide = in_double(logits_fn, x.shape[1:]), np.asarray(x, np.float64)
        double = network(jnp.asarray(wide))
        moved = attacks.pgd(network, wide, y, KEY, eps=0.01, num_steps=2)
    assert double.dtype == moved.dtype == jnp.float64
    np.testing.assert_allclose(double, logits_fn(x), atol=1e-4)
    assert (np.asarray(moved) != wide).any()


@pytest.mark.slow  # tests/test_modes.py audits one of lax
@pytest.mark.parametrize("name", CONVOLUTIONS[1:])
def test_a_convolution_is_audited_with_nothing_skipped(name):
    logits_fn, (x, _) = NETWORKS[name](0), examples()
    report = audit(logits_fn, x, logits_fn(x).argmax(-1), KEY, eps=0.01, **QUICKLY)
    skipped = [check for check in report.checks if check.verdict == "skipped"]
    assert {check.name for check in skipped} <= {"transfer"}, skipped


def test_precision_is_compared_where_a_network_computes_in_float32_whatever_its_input():
    network = standard()
    report = look(lambda x: network(x.astype(jnp.float32)), norm=MINE, eps=0.5)
    assert {c.name: c.verdict for c in report.checks}["precision"] == "pass"


def test_a_derivative_of_the_caller_s_is_not_replaced_by_jax_s():
    straight = jax.custom_jvp(jax.nn.relu)
    straight.defjvps(lambda tangent, out, x: tangent)
    for fn in (jax.nn.relu, straight):

        def network(x, fn=fn):
            return fn(x.astype(jnp.float32))

        with jax.enable_x64(True):
            if fn is straight:
                with pytest.raises(NotInDouble, match="contains a custom_jvp_call"):
                    in_double(network, (3,))
            else:
                assert in_double(network, (3,)).program.outputs.dtype == jnp.float64


def test_a_training_loss_has_one_number_an_example_of_any_type():
    x, keys = jnp.ones((2, 3), jnp.bfloat16), jax.random.split(KEY, 2)
    rows = {"x": x, "y": jnp.zeros(2, jnp.int32), "key": keys}

    def narrow(logits, labels):
        return (logits**2).sum(-1)

    def held(loss):
        attack = _Attack((losses.cross_entropy, loss), "linf", 1)
        return jax.eval_shape(lambda rows: attack(lambda x: x, rows, 0.1, 1, jnp.ones(())), rows)

    assert held(narrow).dtype == bool
    with pytest.raises(ValueError, match="one number an example, .*: leave out .mean"):
        held(lambda logits, labels: narrow(logits, labels).mean())


def test_what_cannot_run_in_float64_is_skipped_and_says_why():
    x, y = examples()
    rows = np.asarray(x).reshape(len(x), -1)
    weights, _ = weights_of(0)
    looped = repeated(lambda x: x.astype(jnp.float32) @ weights)
    report = audit(looped, rows, looped(rows).argmax(-1), KEY, eps=0.01, **QUICKLY)
    for name, reason in (("precision", "contains a scan"), ("square", "need images")):
        check = next(check for check in report.checks if check.name == name)
        assert check.verdict == "skipped" and reason in check.evidence

    def reads_bits(x):  # only works on 32-bit numbers
        is_positive = jax.lax.bitcast_convert_type(x, jnp.int32) >= 0
        return (is_positive * x).reshape(len(x), -1)[:, :4]

    with jax.enable_x64(True), pytest.raises(NotInDouble, match="does not take other types"):
        in_double(reads_bits, x.shape[1:])


def lab_where(holds, training_loss=None):
    """The lab of an audit whose 200 points all hold against loss number n if holds(n)."""
    rows = {"x": np.zeros((200, 4), np.float32), "y": np.zeros(200, np.int32)}
    run = lambda attack: lambda rows, eps, which, scale: np.full(200, holds(which))  # noqa: E731
    logits = np.eye(4, dtype=np.float32)[rows["y"]]
    return _Lab(run, None, rows, logits, 0.1, "linf", training_loss)


def test_a_share_is_judged_by_the_lower_end_of_its_interval():
    lab = lab_where(lambda which: True)
    grades = [lab.grade(count / 200, (0.01, 0.05)) for count in (2, 4, 8, 15, 25)]
    assert grades == ["pass", "pass", "warn", "warn", "fail"]


def test_without_a_surrogate_transfer_is_skipped_and_mistakes_are_told():
    x, y = test_points(120)
    result = look(switched(standard()), surrogates={}, eps=0.01)
    assert {c.name: c.verdict for c in result.checks}["transfer"] == "skipped"
    assert result.verdict == "pass"
    with pytest.raises(ValueError, match="eps must be above 0, not 0"):
        audit(standard(), x, y, KEY, eps=0)
    fewer = {"other": lambda x: standard()(x)[:, :6]}
    with pytest.raises(ValueError, match="'other' has 6 classes and the network 10"):
        audit(standard(), x, y, KEY, eps=0.1, surrogates=fewer)
    with pytest.raises(ValueError, match="none of the 120 examples is classified correctly"):
        audit(lambda x: standard()(x)[:, ::-1] * 0 - jnp.arange(10), x, y * 0 + 9, KEY, eps=0.1)


def assert_the_training_loss_is_named(check):
    assert check.name == "losses" and check.verdict == "warn"
    assert "the loss it was trained with is the weak attack" in check.evidence


def flat(logits, y):
    return 0 * losses.cross_entropy(logits, y)


def test_a_loss_it_was_trained_to_be_flat_in_is_named():
    lab = lab_where(lambda which: which == 3, training_loss=flat)
    assert lab.share("cross_entropy") == 0 and lab.share("training_loss") == 1
    assert_the_training_loss_is_named(_check_losses(lab))
    assert _check_losses(lab_where(lambda which: False, training_loss=flat)).verdict == "pass"


@pytest.mark.slow
def test_a_flat_loss_is_found_to_be_the_weak_attack():
    result = look(switched(standard()), eps=0.15, training_loss=flat)
    (check,) = (check for check in result.checks if check.name == "losses")
    assert_the_training_loss_is_named(check)

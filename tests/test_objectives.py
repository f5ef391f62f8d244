"""Objectives: which terms, on which half, with which statistics, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from robust_jax import attacks, losses
from robust_jax import jacobian as jacobians
from robust_jax.train import regularizers
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.regularizers import REGULARIZERS, Half, Term

KEY = jax.random.key(0)
K = 3


class Net(nn.Module):
    """A smooth network with BatchNorm, so that training and evaluation modes differ."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(K)(jnp.tanh(x))


NET = Net()


def apply(params, batch_stats, x, train, keys=None):
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
        return NET.apply(variables, x), batch_stats
    logits, mutated = NET.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, mutated["batch_stats"]


@pytest.fixture(scope="module")
def setting():
    x = jax.random.uniform(KEY, (8, 4, 4, 1))
    variables = NET.init(KEY, x)
    batch = {"image": x, "label": jnp.arange(8) % K, "position": jnp.arange(8)}
    return variables["params"], variables["batch_stats"], batch


def adversary(**keywords):
    against_clean_logits = keywords.get("loss") is losses.kl
    if against_clean_logits:
        keywords["criterion"] = attacks.never

    def attack(f, x, y, k):
        return attacks.pgd(f, x, y, k, eps=0.1, num_steps=3, **keywords)

    return Adversary(attack, against_clean_logits)


def run(setting, **keywords):
    params, stats, batch = setting
    objective = make_objective(apply, loss=losses.cross_entropy, **keywords)
    per_example, (new_stats, sums) = jax.jit(objective)(params, stats, batch, KEY)
    return np.asarray(per_example), new_stats, sums


def test_clean_loss_is_the_loss_of_the_training_mode_network(setting):
    params, stats, batch = setting
    values, new_stats, sums = run(setting, loss_on="clean")
    logits, expected_stats = apply(params, stats, batch["image"], True)
    np.testing.assert_allclose(values, losses.cross_entropy(logits, batch["label"]), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new_stats, expected_stats
    )
    np.testing.assert_allclose(sums["loss"][0], values.sum(), rtol=1e-5)
    assert sums["loss"][1] == 8
    assert set(sums) == {"loss", "supervised_loss", "clean_accuracy"}


def test_adversarial_half_raises_the_loss_and_alone_moves_the_statistics(setting):
    clean, clean_stats, _ = run(setting, loss_on="clean")
    adversarial, stats, sums = run(setting, loss_on="adversarial", adversary=adversary())
    assert adversarial.mean() > clean.mean()
    assert "clean_accuracy" not in sums
    leaves = zip(jax.tree.leaves(stats), jax.tree.leaves(clean_stats), strict=True)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in leaves)


def test_adversary_sees_the_evaluation_mode_network(setting):
    params, stats, batch = setting
    seen = []

    def spy(logits_fn, x, y, keys):
        seen.append(logits_fn(x))
        return x

    objective = make_objective(
        apply, loss=losses.cross_entropy, loss_on="adversarial", adversary=Adversary(spy)
    )
    objective(params, stats, batch, KEY)
    np.testing.assert_allclose(seen[0], apply(params, stats, batch["image"], False)[0], rtol=1e-5)
    assert np.abs(seen[0] - apply(params, stats, batch["image"], True)[0]).max() > 0.1


def test_over_both_halves_the_statistics_pass_through_each(setting):
    params, stats, batch = setting
    shifted = Adversary(lambda f, x, y, k: jnp.clip(x + 0.3, 0, 1))
    _, new_stats, _ = run(setting, loss_on="both", adversary=shifted)
    _, expected = apply(params, stats, batch["image"], True)
    _, expected = apply(params, expected, jnp.clip(batch["image"] + 0.3, 0, 1), True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), new_stats, expected)


def test_unlabelled_examples_are_attacked_away_from_their_prediction(setting):
    params, stats, batch = setting
    seen = []

    def spy(logits_fn, x, y, keys):
        seen.append(y)
        return x

    objective = make_objective(
        apply,
        loss=losses.cross_entropy,
        loss_on="adversarial",
        adversary=Adversary(spy),
        labeled_fraction=0.5,
    )
    labels = jnp.where(jnp.arange(8) < 4, batch["label"], -1)
    objective(params, stats, {**batch, "label": labels}, KEY)
    predictions = jnp.argmax(apply(params, stats, batch["image"], False)[0], -1)
    np.testing.assert_array_equal(seen[0][:4], batch["label"][:4])
    np.testing.assert_array_equal(seen[0][4:], predictions[4:])


def test_both_is_the_mean_of_the_halves(setting):
    clean, _, _ = run(setting, loss_on="clean")
    adversarial, _, _ = run(setting, loss_on="adversarial", adversary=adversary())
    both, _, _ = run(setting, loss_on="both", adversary=adversary())
    np.testing.assert_allclose(both, (clean + adversarial) / 2, rtol=1e-4)


def test_entm_is_cross_entropy_minus_weighted_entropy(setting):
    params, stats, batch = setting
    plain, _, _ = run(setting, loss_on="clean")
    terms = {"entropy": Term(regularizers.entropy, 2.0, "clean")}
    values, _, sums = run(setting, loss_on="clean", terms=terms)
    logits, _ = apply(params, stats, batch["image"], True)
    np.testing.assert_allclose(values, plain - 2.0 * losses.entropy(logits), rtol=1e-4)
    np.testing.assert_allclose(
        sums["regularizers/entropy"][0], -losses.entropy(logits).sum(), rtol=1e-4
    )


def test_trades_takes_its_loss_and_its_statistics_from_the_clean_half(setting):
    clean, clean_stats, _ = run(setting, loss_on="clean")
    terms = {"kl": Term(regularizers.kl, 6.0, "clean")}
    values, stats, sums = run(
        setting,
        loss_on="clean",
        terms=terms,
        adversary=adversary(loss=losses.kl, criterion=attacks.never),
    )
    assert (values >= clean - 1e-4).all()
    np.testing.assert_allclose(
        values.mean() - clean.mean(), 6 * sums["regularizers/kl"][0] / 8, rtol=1e-3
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, clean_stats)


def test_cot_adds_the_negated_complement_entropy(setting):
    params, stats, batch = setting
    plain, _, _ = run(setting, loss_on="clean")
    terms = {"complement_entropy": Term(regularizers.complement_entropy, 0.1, "clean")}
    values, _, _ = run(setting, loss_on="clean", terms=terms)
    logits, _ = apply(params, stats, batch["image"], True)
    expected = plain - 0.1 * losses.complement_entropy(logits, batch["label"])
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_kl_term_is_from_clean_to_adversarial():
    """The term is Σ p log(p/q) with p of the clean half, rather than its reverse."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    clean, adversarial = (
        Half(jnp.zeros((1, 1, 1, 1)), jnp.log(jnp.asarray(r, jnp.float32))[None]) for r in (p, q)
    )
    forward = (p * np.log(p / q)).sum()
    assert abs(forward - (q * np.log(q / p)).sum()) > 0.05
    labels = jnp.asarray([1])
    np.testing.assert_allclose(regularizers.kl(clean, adversarial), [forward], rtol=1e-5)
    np.testing.assert_allclose(
        regularizers.weighted_kl(clean, adversarial, labels), [forward * 0.8], rtol=1e-5
    )


def test_weighted_kl_is_mart(setting):
    params, stats, batch = setting
    clean = Half(batch["image"], apply(params, stats, batch["image"], False)[0])
    other = Half(batch["image"], clean.logits[::-1])
    doubt = 1 - losses.confidence(clean.logits, batch["label"])
    np.testing.assert_allclose(
        regularizers.weighted_kl(clean, other, batch["label"]),
        losses.kl(other.logits, clean.logits) * doubt,
        rtol=1e-5,
    )


def test_unlabelled_examples_enter_label_free_terms_only(setting):
    params, stats, batch = setting
    labels = jnp.where(jnp.arange(8) < 4, batch["label"], -1)
    half = (params, stats, {**batch, "label": labels})
    full, _, _ = run(setting, loss_on="clean")
    values, _, sums = run(half, loss_on="clean", labeled_fraction=0.5)
    np.testing.assert_allclose(values[:4], 2 * full[:4], rtol=1e-5)  # a mean over labelled ones
    np.testing.assert_array_equal(values[4:], 0)
    assert sums["clean_accuracy"][1] == 4
    terms = {
        "entropy": Term(regularizers.entropy, 1.0, "clean"),
        "input_gradient": Term(regularizers.input_gradient, 1.0, "clean"),
    }
    _, _, sums = run(half, loss_on="clean", labeled_fraction=0.5, terms=terms)
    _, _, all_sums = run(setting, loss_on="clean", terms=terms)
    np.testing.assert_allclose(
        sums["regularizers/entropy"][0], all_sums["regularizers/entropy"][0], rtol=1e-5
    )
    assert sums["regularizers/input_gradient"][0] != all_sums["regularizers/input_gradient"][0]


def test_key_follows_the_position_not_the_row(setting):
    params, stats, batch = setting
    terms = {"jacobian": Term(regularizers.jacobian, 1.0, "clean")}
    objective = make_objective(apply, loss=losses.cross_entropy, loss_on="clean", terms=terms)
    values, _ = objective(params, stats, batch, KEY)
    reversed_batch = jax.tree.map(lambda a: a[::-1], batch)
    reversed_values, _ = objective(params, stats, reversed_batch, KEY)
    np.testing.assert_allclose(values, reversed_values[::-1], rtol=1e-4)


def test_one_regulariser_twice_under_labels_of_ones_own(setting):
    """A term's function does not depend on its label, which may be another regulariser's name."""
    params, stats, batch = setting
    plain, _, _ = run(setting, loss_on="clean")
    shifted = Adversary(lambda f, x, y, k: jnp.clip(x + 0.1, 0, 1))
    terms = {
        "kl": Term(regularizers.entropy, 1.0, "clean"),
        "entropy": Term(regularizers.entropy, 2.0, "adversarial"),
    }
    values, _, sums = run(setting, loss_on="clean", terms=terms, adversary=shifted)
    halves = [
        apply(params, stats, x, True)[0]
        for x in (batch["image"], jnp.clip(batch["image"] + 0.1, 0, 1))
    ]
    entropies = [np.asarray(losses.entropy(logits)) for logits in halves]
    np.testing.assert_allclose(values, plain - entropies[0] - 2 * entropies[1], rtol=1e-4)
    np.testing.assert_allclose(sums["regularizers/kl"][0], -entropies[0].sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["regularizers/entropy"][0], -entropies[1].sum(), rtol=1e-4)


def test_a_term_of_the_parameters_counts_once_for_every_example(setting):
    params, _, _ = setting

    def squared_norm(params):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    plain, _, _ = run(setting, loss_on="clean")
    term = Term(squared_norm, 0.1, "clean")
    values, _, sums = run(setting, loss_on="clean", terms={"decay": term})
    np.testing.assert_allclose(values - plain, np.full(8, 0.1 * squared_norm(params)), rtol=1e-4)
    np.testing.assert_allclose(
        sums["regularizers/decay"][0] / sums["regularizers/decay"][1],
        squared_norm(params),
        rtol=1e-5,
    )
    assert term.halves == () and not term.needs_labels


def test_what_a_term_cannot_see_is_told():
    with pytest.raises(TypeError, match="cannot look at logits; choices: half, clean, adversarial"):
        Term(lambda logits, labels: logits, 1.0, "clean")


KEYWORDS = {
    "vat": {"eps": 0.5},
    "output_margin_ramp": {"tau": 2.0},
    "input_margin": {"tau": 0.1},
    "energy_mean_square": {"eps": 0.2},
    "energy_oscillation": {"eps": 0.2, "norm": "l2", "num_steps": 2},
    "energy_total_variation": {"eps": 0.2, "norm": "l2"},
    "energy_path": {"eps": 0.2, "norm": "l2", "num_steps": 2},
}
LABEL_FREE = [name for name in KEYWORDS if name.startswith("energy_")]
EVERY = {
    **{name: functools.partial(fn, **KEYWORDS.get(name, {})) for name, fn in REGULARIZERS.items()},
    **{
        f"{name}_label_free": functools.partial(
            REGULARIZERS[name], label_free=True, **KEYWORDS[name]
        )
        for name in LABEL_FREE
    },
}


# One term for each kind of input; over both halves, a term is the mean of its values on each.
KINDS = ("entropy", "weighted_kl", "jacobian", "input_margin", "orthogonality")


@pytest.mark.parametrize(
    ("name", "on"),
    [
        *((name, "adversarial") for name in EVERY),
        *(
            pytest.param(name, "both", marks=[] if name in KINDS else pytest.mark.slow)
            for name in EVERY
        ),
    ],
)
def test_parameters_are_pulled_in_the_direction_that_lowers_the_term(name, on, setting):
    """A small step against the objective's gradient lowers it as predicted: no part is cut off."""
    params, stats, batch = setting
    term = Term(EVERY[name], 5.0, on)
    shifted = Adversary(lambda f, x, y, k: jnp.clip(x + 0.1, 0, 1))
    objective = make_objective(
        apply, loss=losses.cross_entropy, loss_on=on, adversary=shifted, terms={name: term}
    )

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(params):
        return objective(params, stats, batch, KEY)[0].mean()

    params = jax.device_get(params)
    before, gradient = jax.device_get(value_and_gradient(params))
    squared_norm = sum((g**2).sum() for g in jax.tree.leaves(gradient))
    assert 0 < squared_norm < np.inf
    step = np.float32(1e-3)
    after, _ = value_and_gradient(jax.tree.map(lambda p, g: p - step * g, params, gradient))
    # Without labels the prediction at x is held constant, as in VAT, although it moves.
    rtol = 0.5 if name == "vat" or name.endswith("label_free") else 0.15
    np.testing.assert_allclose(before - after, step * squared_norm, rtol=rtol)


def test_a_term_looks_at_the_labels_where_it_says_that_it_needs_them(setting):
    params, _, batch = setting
    logits_fn, _ = frozen_network(setting)
    images = {"clean": batch["image"], "adversarial": jnp.clip(batch["image"] + 0.1, 0, 1)}
    terms = {name: Term(fn, 1.0, "clean") for name, fn in EVERY.items()}

    @jax.jit
    def values(labels):
        halves = {half: Half(x, logits_fn(x)) for half, x in images.items()}
        given = {"logits_fn": logits_fn, "labels": labels, "params": params}
        keys = jax.random.split(KEY, 8)
        return {name: term(halves, keys=keys, **given) for name, term in terms.items()}

    one, other = (values((batch["label"] + shift) % K) for shift in (0, 1))
    for name, term in terms.items():
        assert np.array_equal(one[name], other[name]) != term.needs_labels, name


def frozen_network(setting):
    params, stats, batch = setting
    return (lambda x: apply(params, stats, x, False)[0]), batch


def test_jacobian_term_is_unbiased(setting):
    logits_fn, batch = frozen_network(setting)
    half = Half(batch["image"], logits_fn(batch["image"]))
    values = regularizers.jacobian(logits_fn, half, jax.random.split(KEY, 8), num_projections=4000)
    exact = jacobians.frobenius_norm(logits_fn, batch["image"]) ** 2
    np.testing.assert_allclose(values, exact, rtol=0.1)


def test_input_gradient_term_is_the_squared_norm(setting):
    logits_fn, batch = frozen_network(setting)
    half = Half(batch["image"], logits_fn(batch["image"]))
    values = regularizers.input_gradient(logits_fn, half, batch["label"])

    def loss(image, label):
        return losses.cross_entropy(logits_fn(image[None]), label[None])[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(batch["image"], batch["label"])
    np.testing.assert_allclose(values, (np.asarray(gradients) ** 2).sum((1, 2, 3)), rtol=1e-4)


def test_vat_direction_is_the_top_eigenvector_of_the_fisher_metric(setting):
    """At small eps, VAT's KL is ½ eps² times the largest eigenvalue of JᵀFJ, from an SVD."""
    logits_fn, batch = frozen_network(setting)
    x = batch["image"]
    half = Half(x, logits_fn(x))
    eps = 0.02
    values = regularizers.vat(logits_fn, half, jax.random.split(KEY, 8), eps=eps, num_iterations=30)
    jacobian = np.asarray(jacobians.jacobian(logits_fn, x), np.float64).reshape(8, K, -1)
    p = np.asarray(jax.nn.softmax(half.logits), np.float64)
    for i in range(8):
        fisher = np.diag(p[i]) - np.outer(p[i], p[i])
        top = np.linalg.eigvalsh(jacobian[i].T @ fisher @ jacobian[i])[-1]
        np.testing.assert_allclose(values[i], eps**2 / 2 * top, rtol=0.1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss_on": "adversarial"}, "loss_on needs the adversarial half .* adversary is None"),
        ({"loss_on": "x"}, "loss_on must be one of clean, adversarial, both, not 'x'"),
        (
            {"loss_on": "clean", "terms": {"kl": Term(regularizers.kl, 1.0, "clean")}},
            "regularizers.kl needs the adversarial half",
        ),
        (
            {"loss_on": "clean", "terms": {"entropy": Term(regularizers.entropy, 1.0, "z")}},
            "regularizers.entropy.on must be one of",
        ),
    ],
)
def test_mistakes_are_told(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_objective(apply, loss=losses.cross_entropy, **keywords)

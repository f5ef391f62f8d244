"""Measurements by name: finite numbers, those that the studies ask for, equal to what they say."""

import fnmatch
import functools
import importlib
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import data, losses, margins, models
from robust_jax.app import measurements, run
from robust_jax.app.measurements import MEASUREMENTS, NUMBERS, Subject
from robust_jax.app.studies import measures
from robust_jax.errors import UserError
from tests.test_study import STUDIES


@functools.cache
def subject():
    dataset = data.load("digits", validation_size=100)
    model = models.CNN(num_classes=10, mean=(0.3,), std=(0.4,), widths=(4, 4), hidden=8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    logits_fn = functools.partial(model.apply, variables)
    return Subject(model, variables, logits_fn, dataset, jax.random.key(1))


@functools.cache
def measured(name, **own):
    known = inspect.signature(MEASUREMENTS[name]).parameters
    keywords = {"num_examples": 60, "eps": 0.1, "num_samples": 2, "num_steps": 2, **own}
    return MEASUREMENTS[name](subject(), **{k: v for k, v in keywords.items() if k in known})


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_numbers_are_finite(name):
    found = measured(name)
    arrays = [value for value in found.values() if isinstance(value, np.ndarray)]
    numbers = [value for value in found.values() if isinstance(value, float | int)]
    assert numbers and len(numbers) + len(arrays) == len(found)
    named = [key for key, value in found.items() if not isinstance(value, np.ndarray)]
    for pattern in NUMBERS[name]:  # all that a study may ask for exists
        assert fnmatch.filter(named, pattern), pattern
    assert all(any(fnmatch.fnmatch(key, p) for p in NUMBERS[name]) for key in named)
    assert np.isfinite(numbers).all() and all(array.size for array in arrays)
    kept = [key for key in found if key.startswith("of_images/")]
    # Spectra and clusters are not means, and margins are by default of training images.
    assert bool(kept) == (name not in ("spectra", "clusters", "margins"))
    for key, values in found.items():
        if key in kept:
            number = found[key.removeprefix("of_images/")]
            assert len(values) == 60 and values.mean() == pytest.approx(number, rel=1e-5)


@pytest.mark.parametrize("name", ["margins", "outputs"])
def test_images_of_training_which_are_others_for_each_seed_are_not_kept(name):
    assert not [key for key in measured(name, split="train") if key.startswith("of_images")]
    assert [key for key in measured(name, split="test") if key.startswith("of_images")]


def test_a_gap_is_kept_as_that_between_all_training_images_and_each_test_image():
    def right(split):
        logits = subject().logits_fn(data.to_pixels(split.images[:60]))
        return np.asarray(losses.correct(logits, split.labels[:60]))

    gaps, dataset = measured("gaps"), subject().dataset
    train, test = right(dataset.train), right(dataset.test)
    np.testing.assert_allclose(gaps["of_images/accuracy"], train.mean() - test, rtol=1e-6)
    assert gaps["accuracy"] == pytest.approx(train.mean() - test.mean(), abs=1e-6)


def test_an_image_that_did_not_move_is_left_out_of_a_layers_changes(monkeypatch):
    def all_but_zeros(fn, x, y, *_, **__):
        return jnp.where((y == 0)[:, None, None, None], x, x + 0.1)

    monkeypatch.setattr(measurements, "pgd", all_but_zeros)
    found = MEASUREMENTS["features"](subject(), eps=0.1, num_examples=20)
    adversarial, random = (found[f"change_{kind}/logits"] for kind in ("adversarial", "random"))
    moved = subject().dataset.test.labels[:20] != 0
    assert (np.isfinite(adversarial) == moved).all() and 0 < moved.sum() < 20
    mean = adversarial[moved].mean()
    assert found["adversarial/logits"] == pytest.approx(mean, rel=1e-5)
    assert found["random/logits"] == pytest.approx(random.mean(), rel=1e-5)
    ratio = found["adversarial_over_random/logits"]
    assert ratio == pytest.approx(mean / random[moved].mean(), rel=1e-5)
    arrays = {f"features/{name}": found[name] for name in found if name.startswith("of_images/")}
    results = {"measurements": {"features": found}}
    path = "measurements.features.{}/logits".format
    assert measures.outcomes(results, None, arrays, path("adversarial")) is None
    assert len(measures.outcomes(results, None, arrays, path("random"))) == 20


def test_every_image_tells_how_it_changes_a_layer_and_the_ratio_of_two_changes():
    changes = measured("features")
    images = 60
    adversarial, random = (changes[f"change_{kind}/logits"] for kind in ("adversarial", "random"))
    assert np.isfinite(adversarial).all() and (adversarial > 0).all()  # the misclassified move too
    shares = changes["of_images/adversarial_over_random/logits"]
    ratio = changes["adversarial_over_random/logits"]
    assert ratio == pytest.approx(adversarial.mean() / random.mean(), rel=1e-5)
    without = [
        np.delete(adversarial, i).mean() / np.delete(random, i).mean() for i in range(images)
    ]
    pseudo_values = images * ratio - (images - 1) * np.array(without)
    # They agree to first order, which gives the interval of the jackknife.
    assert np.corrcoef(shares, pseudo_values)[0, 1] > 0.999
    np.testing.assert_allclose(shares.std(), np.std(pseudo_values), rtol=0.05)


def test_what_a_study_draws_is_what_its_numbers_say():
    outputs, spectra, changes = (measured(name) for name in ("outputs", "spectra", "features"))
    np.testing.assert_allclose(outputs["output_margin"].mean(), outputs["mean_margin"], rtol=1e-5)
    layer = next(name for name in spectra if name.startswith("maximum/")).partition("/")[2]
    drawn = spectra[f"singular_values/{layer}"]
    assert drawn[0] == spectra[f"maximum/{layer}"] and (np.diff(drawn) <= 0).all()
    np.testing.assert_allclose(
        changes["change_random/logits"].mean(), changes["random/logits"], rtol=1e-5
    )
    layers = [name for name in changes if name.startswith("random/")]
    assert layers == ["random/conv1", "random/conv2", "random/dense1", "random/logits"], layers
    assert measured("clusters")["projection"].shape == measured("clusters")["tsne"].shape == (60, 2)
    along = measured("interior")
    np.testing.assert_allclose(along["loss_along"].mean(0)[2], along["loss/50"], rtol=1e-5)
    np.testing.assert_allclose(
        along["loss/0"],
        losses.cross_entropy(*(jnp.asarray(a) for a in outputs_of(60))).mean(),
        rtol=1e-5,
    )


def outputs_of(count):
    """Logits and labels of the first test images."""
    test = subject().dataset.test
    return subject().logits_fn(data.to_pixels(test.images[:count])), test.labels[:count]


def test_what_is_free_of_scale_does_not_change_with_it():
    """Rescaling a layer and the logits moves their raw numbers, not the scale-free ones."""
    one = subject()
    params = dict(one.variables["params"])
    params["head"] = jax.tree.map(lambda a: 5 * a, params["head"])
    params["Conv_0"] = jax.tree.map(lambda a: 3 * a, params["Conv_0"])
    params["Conv_1"] = {**params["Conv_1"], "kernel": params["Conv_1"]["kernel"] / 3}
    variables = {"params": params}
    other = one._replace(
        variables=variables, logits_fn=functools.partial(one.model.apply, variables)
    )
    few = {"eps": 0.1, "num_examples": 60}
    for name, keywords, numbers in (
        ("spectra", {}, {"relative_spread/Conv_0": "standard_deviation/Conv_0"}),
        ("features", few, {f"relative_random/{h}": f"random/{h}" for h in ("conv1", "logits")}),
    ):
        found, scaled = (MEASUREMENTS[name](s, **keywords) for s in (one, other))
        for free, raw in numbers.items():
            assert scaled[free] == pytest.approx(found[free], rel=1e-4), free
            assert scaled[raw] > 2 * found[raw], raw


def test_gap_doubt_and_saturation_of_logits_known_by_hand():
    gap = np.array([2.0, 10.0, 10.0, 40.0])
    y = subject().dataset.test.labels[:4]
    logits = jnp.asarray(gap[:, None] * np.eye(10)[y], jnp.float32)
    network = subject()._replace(logits_fn=lambda x: logits[: len(x)])
    found = MEASUREMENTS["outputs"](network, num_examples=4)
    assert found["median_gap"] == pytest.approx(10)
    assert found["median_doubt"] == pytest.approx(9 / (9 + np.exp(10)), rel=1e-5)  # 4.1e-4
    assert found["saturated"] == 0.25


def test_published_margins_are_distances_from_the_predicted_class():
    clever = measured("margins", estimate="clever", num_samples=4)["input_margin"]
    assert (clever >= 0).all() and (clever <= 5).all()
    train = subject().dataset.train
    x = data.to_pixels(train.images[:60])
    predicted = jnp.argmax(subject().logits_fn(x), -1)
    first_order = margins.first_order(subject().logits_fn, x, predicted, norm="l2")
    assert (clever < 1.5 * first_order + 1e-6).all()  # its gradients are around x, not only at x
    test = measured("margins", estimate="first_order", split="test")
    assert test["mean"] != measured("margins", estimate="first_order")["mean"]


def test_the_label_free_energies_are_of_another_loss():
    free, labelled = (measured("energy", label_free=free) for free in (True, False))
    for found in (free, labelled):
        assert 0 < found["rise"] <= found["oscillation"] * (1 + 1e-6)
        assert found["rise"] <= found["path"] * (1 + 1e-6) and found["total_variation"] > 0
    assert free["oscillation"] < labelled["oscillation"]


def test_estimates_of_margins_bound_each_other():
    lower, upper = (
        measured("margins", estimate=estimate, num_steps=20)["input_margin"]
        for estimate in ("lipschitz", "minimum_norm")
    )
    found = np.isfinite(upper)  # an untrained network never predicts some labels
    assert found.sum() > 5
    assert (np.abs(lower)[found] <= np.abs(upper)[found] + 1e-6).all()
    assert (np.sign(lower)[found] == np.sign(upper)[found]).all()
    other = subject()._replace(model=models.PreActResNet(num_classes=10))
    with pytest.raises(UserError, match="are for Linear, .* not for a PreActResNet"):
        MEASUREMENTS["margins"](other, estimate="lipschitz", num_examples=4)


@pytest.mark.parametrize("estimate", ["first_order", "minimum_norm"])
def test_a_collapsed_network_has_no_margins_and_loses_no_run(estimate):
    flat = subject()._replace(logits_fn=lambda x: jnp.zeros((len(x), 10)) + jnp.arange(10.0))
    found = MEASUREMENTS["margins"](flat, estimate=estimate, num_examples=6, num_steps=2)
    assert found == {"count": 0, "not_finite": 6}


def test_arrays_are_kept_apart_and_what_is_not_finite_is_null(monkeypatch):
    values = np.arange(3.0)
    found = {"whole": 2, "share": 0.5, "nothing": float("nan"), "values": values}
    monkeypatch.setattr(run, "subject_of", lambda experiment, trained, at: at)
    seen = []
    measurements = {label: lambda at: (seen.append(at), found)[1] for label in ("one", "first")}
    numbers, arrays = run._measured(
        SimpleNamespace(
            experiment=SimpleNamespace(measurements=measurements),
            trained=None,
            asked=SimpleNamespace(measurements={"one": {}, "first": {"at": "initialisation"}}),
        )
    )
    assert numbers["one"] == {"whole": 2, "share": 0.5, "nothing": None}
    assert list(numbers) == ["one", "first"] and seen == ["best", "initialisation"]
    np.testing.assert_array_equal(arrays["one/values"], values)


def test_outputs_of_either_split_and_spectra_of_either_output():
    assert measured("outputs", split="train") != measured("outputs")
    assert (
        measured("jacobian_spectrum", of="probabilities")["0"] < measured("jacobian_spectrum")["0"]
    )


@pytest.mark.parametrize("name", STUDIES)
def test_studies_ask_for_numbers_that_there_are(name):
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    wanted = [measure for _, measure in config.measures]
    wanted += [test["measure"] for claim in config.claims.values() for test in claim.tests]
    for measure in (part for one in wanted for part in one.split(" - ")):
        if measure.startswith("measurements."):
            _, measurement, number = measure.split(".")
            measurement = config.base.measurements[measurement].get("name", measurement)
            numbers = fnmatch.filter(measured(measurement), number)
            assert numbers, measure


def test_numbers_are_those_of_the_network():
    test = subject().dataset.test
    logits = subject().logits_fn(data.to_pixels(test.images[:60]))
    margin = np.asarray(losses.margin(logits, test.labels[:60]))
    np.testing.assert_allclose(measured("outputs")["mean_margin"], margin.mean(), rtol=1e-4)
    np.testing.assert_allclose(measured("outputs")["std_margin"], margin.std(), rtol=1e-4)
    train = subject().dataset.train
    accuracies = [
        np.mean(losses.correct(subject().logits_fn(data.to_pixels(s.images[:60])), s.labels[:60]))
        for s in (train, test)
    ]
    np.testing.assert_allclose(
        measured("gaps")["accuracy"], accuracies[0] - accuracies[1], atol=1e-6
    )
    assert measured("energy")["oscillation"] > measured("energy")["mean_square"] > 0


def test_outputs_that_are_no_numbers_lose_no_run():
    whole = subject()

    def logits_fn(x):  # NaN for every second image
        odd = jnp.arange(len(x)) % 2 == 1
        return jnp.where(odd[:, None], jnp.nan, whole.logits_fn(x))

    found = MEASUREMENTS["outputs"](whole._replace(logits_fn=logits_fn), num_examples=20)
    assert np.isnan(found["mean_margin"]) and np.isnan(found["confidence"]).any()
    assert 0 <= found["calibration_error"] <= 1

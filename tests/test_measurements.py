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

from robust_jax import data, losses, models
from robust_jax.app import run, runs
from robust_jax.app.measurements import MEASUREMENTS, NUMBERS, Subject
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
    for pattern in NUMBERS[name]:  # what a study may ask for is what there is
        assert fnmatch.filter(named, pattern), pattern
    assert all(any(fnmatch.fnmatch(key, p) for p in NUMBERS[name]) for key in named)
    assert np.isfinite(numbers).all() and all(array.size for array in arrays)


def test_what_a_study_draws_is_what_its_numbers_say():
    outputs, spectra, changes = (measured(name) for name in ("outputs", "spectra", "features"))
    np.testing.assert_allclose(outputs["output_margin"].mean(), outputs["mean_margin"], rtol=1e-5)
    layer = next(name for name in spectra if name.startswith("maximum/")).partition("/")[2]
    drawn = spectra[f"singular_values/{layer}"]
    assert drawn[0] == spectra[f"maximum/{layer}"] and (np.diff(drawn) <= 0).all()
    np.testing.assert_allclose(
        changes["change_random/logits"].mean(), changes["random/logits"], rtol=1e-5
    )
    assert measured("clusters")["projection"].shape == (60, 2)


def test_estimates_of_margins_bound_each_other():
    lower, upper = (
        measured("margins", estimate=estimate, num_steps=20)["input_margin"]
        for estimate in ("lipschitz", "minimum_norm")
    )
    found = np.isfinite(upper)  # of an untrained network: it has labels that it never gives
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


def test_arrays_are_kept_apart_and_what_is_not_finite_is_null(tmp_path, monkeypatch):
    values = np.arange(3.0)
    found = {"whole": 2, "share": 0.5, "nothing": float("nan"), "values": values}
    experiment = SimpleNamespace(measurements={"one": lambda subject: found})
    monkeypatch.setattr(run, "subject_of", lambda *_: None)
    numbers = run._measurements(experiment, None, tmp_path)
    assert numbers == {"one": {"whole": 2, "share": 0.5, "nothing": None}}
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.npz"]
    np.testing.assert_array_equal(runs.measured(tmp_path)["one/values"], values)
    experiment.measurements = {}  # what was measured before is not of this config
    run._measurements(experiment, None, tmp_path)
    assert runs.measured(tmp_path) == {}


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
    for measure in wanted:
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

"""Measurements by name: finite numbers, those that the studies ask for, equal to what they say."""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_jax import data, losses, models
from robust_jax.measurements import MEASUREMENTS, Subject
from tests.test_study import STUDIES


@functools.cache
def subject():
    dataset = data.load("digits", validation_size=100)
    model = models.CNN(num_classes=10, mean=(0.3,), std=(0.4,), widths=(4, 4), hidden=8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    logits_fn = functools.partial(model.apply, variables)
    return Subject(model, variables, logits_fn, dataset, jax.random.key(1))


@functools.cache
def measured(name):
    known = inspect.signature(MEASUREMENTS[name]).parameters
    keywords = {"num_examples": 60, "eps": 0.1, "num_samples": 2, "num_steps": 2}
    return MEASUREMENTS[name](subject(), **{k: v for k, v in keywords.items() if k in known})


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_numbers_are_finite(name):
    found = measured(name)
    assert found and all(isinstance(value, float | int) for value in found.values())
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("name", STUDIES)
def test_studies_ask_for_numbers_that_there_are(name):
    config = importlib.import_module(f"configs.studies.{name}").get_config()
    wanted = [measure for _, measure in config.measures]
    wanted += [test["measure"] for claim in config.claims.values() for test in claim.tests]
    for measure in wanted:
        if measure.startswith("measurements."):
            _, measurement, number = measure.split(".")
            assert number in measured(measurement), measure


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

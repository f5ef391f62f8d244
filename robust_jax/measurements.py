"""What the papers measure of a trained network, as numbers for results.json: by name in a config.

Each is `measurement(subject, *, keywords) -> {name: number}` on the first num_examples of a split.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from robust_jax import data, energy, jacobian, losses
from robust_jax.analysis import calibration, features, latent, margins, spectra
from robust_jax.analysis.summaries import gaps as gaps_between
from robust_jax.analysis.summaries import summary
from robust_jax.attacks import LogitsFn, Norm, pgd
from robust_jax.batches import on_one_device
from robust_jax.keys import fold_in_each

Numbers = dict[str, float]
_BATCH_SIZE = 250


class Subject(NamedTuple):
    """A trained network, its data and a key."""

    model: nn.Module
    variables: Any
    logits_fn: LogitsFn
    dataset: data.Dataset
    key: jax.Array


def outputs(subject: Subject, *, num_examples: int = 1000) -> Numbers:
    """Output margins, confidence, entropy and calibration error on test images."""
    x, y = _examples(subject.dataset.test, num_examples)
    logits = _over(subject, lambda fn, rows: fn(rows["x"]), x, y)
    found = calibration.outcomes(logits, y)
    margin = np.asarray(losses.margin(jnp.asarray(logits), jnp.asarray(y)))
    curve = calibration.reliability(found["top_probability"], found["correct"])
    return {
        "mean_margin": float(margin.mean()),
        "std_margin": float(margin.std()),
        "mean_confidence": float(found["confidence"].mean()),
        "mean_entropy": float(found["entropy"].mean()),
        "calibration_error": calibration.expected_calibration_error(curve),
    }


def input_margins(subject: Subject, *, num_examples: int = 500, norm: Norm = "l2") -> Numbers:
    """First-order margins of training images in the input space (arXiv 1907.11780)."""
    x, y = _examples(subject.dataset.train, num_examples)
    found = _over(
        subject, lambda fn, rows: margins.first_order(fn, rows["x"], rows["y"], norm=norm), x, y
    )
    return summary(found)


def layer_spectra(subject: Subject) -> Numbers:
    """Standard deviation and maximum of each layer's singular values, and their means.

    Of dense layers, and of convolutions with circular padding (arXiv 1805.10408).
    """
    found: Numbers = {}
    shape = subject.dataset.image_shape
    for name, layer in spectra.layers(subject.model, subject.variables, shape).items():
        values = np.asarray(spectra.circular(layer))
        found[f"standard_deviation/{name}"] = float(values.std())
        found[f"maximum/{name}"] = float(values.max())
    for what in ("standard_deviation", "maximum"):
        found[f"mean_{what}"] = float(np.mean([v for k, v in found.items() if k.startswith(what)]))
    return found


def feature_change(
    subject: Subject, *, eps: float, norm: Norm = "linf", num_examples: int = 500
) -> Numbers:
    """‖h(x+δ) - h(x)‖ / ‖δ‖ of each layer, for random and adversarial δ (arXiv 2011.07478)."""
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 0)
    features_fn = features.captured(subject.model, subject.variables)
    moved = {
        "random": features.random_neighbour(jnp.asarray(x), key, eps=eps, norm=norm),
        "adversarial": jax.jit(lambda x, y: pgd(subject.logits_fn, x, y, key, eps=eps, norm=norm))(
            x, y
        ),
    }
    found: Numbers = {}
    for kind, x_moved in moved.items():
        change = jax.jit(lambda a, b: features.change(features_fn, a, b, chunk_size=_BATCH_SIZE))
        by_layer = {name: float(np.nanmean(v)) for name, v in change(x, x_moved).items()}
        found |= {f"{kind}/{name}": value for name, value in by_layer.items()}
        found[f"mean_{kind}"] = float(np.mean(list(by_layer.values())))
    return found


def clusters(subject: Subject, *, num_examples: int = 1000) -> Numbers:
    """Silhouette and intra/inter-class distance of the last layer's input, on test images."""
    x, y = _examples(subject.dataset.test, num_examples)
    features_fn = features.captured(subject.model, subject.variables)
    latents = _over(subject, lambda fn, rows: features_fn(rows["x"])["features"], x, y)
    return {
        "silhouette": latent.silhouette(latents, y),
        "distance_ratio": latent.distance_ratio(latents, y),
    }


def loss_energy(
    subject: Subject,
    *,
    eps: float,
    norm: Norm = "linf",
    num_examples: int = 500,
    num_samples: int = 10,
    num_steps: int = 10,
) -> Numbers:
    """Mean-square and oscillation energy of the loss on test images (arXiv 1911.06479)."""
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 1)

    def measure(fn, rows):
        x, y, keys = rows["x"], rows["y"], fold_in_each(key, rows["index"])
        return {
            "mean_square": energy.mean_square(
                fn, x, y, keys, eps=eps, norm=norm, num_samples=num_samples
            ),
            "oscillation": energy.oscillation(
                fn, x, y, keys, eps=eps, norm=norm, num_steps=num_steps
            ),
        }

    found = _over(subject, measure, x, y)
    return {name: float(values.mean()) for name, values in found.items()}


def gaps(subject: Subject, *, num_examples: int = 1000) -> Numbers:
    """Generalisation gaps: accuracy and cross-entropy on training images minus on test images."""

    def measure(fn, rows):
        logits = fn(rows["x"])
        return {
            "accuracy": losses.correct(logits, rows["y"]),
            "cross_entropy": losses.cross_entropy(logits, rows["y"]),
        }

    splits = (subject.dataset.train, subject.dataset.test)
    return gaps_between(*(_over(subject, measure, *_examples(s, num_examples)) for s in splits))


def jacobian_spectrum(subject: Subject, *, num_examples: int = 200) -> Numbers:
    """Mean singular values of the logits' Jacobian on test images, the largest first."""
    x, y = _examples(subject.dataset.test, num_examples)
    found = _over(subject, lambda fn, rows: jacobian.singular_values(fn, rows["x"]), x, y)
    return {f"{i}": float(value) for i, value in enumerate(found.mean(0))}


MEASUREMENTS: Mapping[str, Callable[..., Numbers]] = {
    "outputs": outputs,
    "margins": input_margins,
    "spectra": layer_spectra,
    "features": feature_change,
    "clusters": clusters,
    "energy": loss_energy,
    "gaps": gaps,
    "jacobian_spectrum": jacobian_spectrum,
}


def _examples(
    split: data.Split | data.Streamed, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first labelled examples of a split."""
    images, labels = split.take(split.labeled[:num_examples])
    return np.asarray(data.to_pixels(images)), labels


def _over(subject: Subject, fn: Callable, x: np.ndarray, y: np.ndarray) -> Any:
    rows = {"x": x, "y": y, "index": np.arange(len(y))}
    return on_one_device(subject.logits_fn, _BATCH_SIZE)(fn)(rows)

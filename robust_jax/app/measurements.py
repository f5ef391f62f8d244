"""What the papers measure of a trained network, by name in a config.

Each is `measurement(subject, *, keywords) -> Found` on the first num_examples of a split, at most
_BATCH_SIZE of them in memory at a time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from robust_jax import data, energy, jacobian, losses, margins, models
from robust_jax.analysis import calibration, features, latent, spectra
from robust_jax.analysis.summaries import gaps as gaps_between
from robust_jax.analysis.summaries import summary
from robust_jax.attacks import Norm, fab, pgd
from robust_jax.batches import on_one_device
from robust_jax.errors import UserError
from robust_jax.keys import fold_in_each
from robust_jax.types import LogitsFn

# Numbers are for results.json; arrays, to draw, for measurements.npz.
Found = dict[str, float | np.ndarray]
_BATCH_SIZE = 250
# Networks of one layer after another, which margins by Lipschitz constants are for.
_CHAINS = (models.Linear, models.MLP, models.CNN, models.LeNet5, models.MadryCNN, models.SmallCNN)


class Subject(NamedTuple):
    """A trained network, its data and a key."""

    model: nn.Module
    variables: Any
    logits_fn: LogitsFn
    dataset: data.Dataset
    key: jax.Array


def outputs(
    subject: Subject, *, split: Literal["train", "test"] = "test", num_examples: int = 1000
) -> Found:
    """Output margins z_y - max_j z_j, confidence p_y, entropy and calibration error.

    Arrays: output_margin, confidence [N]. Costs a forward pass an example.
    """
    x, y = _examples(getattr(subject.dataset, split), num_examples)
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
        "output_margin": margin,
        "confidence": found["confidence"],
    }


def input_margins(
    subject: Subject,
    *,
    estimate: Literal["first_order", "minimum_norm", "lipschitz"] = "first_order",
    num_examples: int = 500,
    norm: Norm = "l2",
    num_steps: int = 100,
) -> Found:
    """Margins of training images in the input space, by one of three estimates (arXiv 1907.11780).

    first_order costs K backward passes an example; minimum_norm, an upper bound, two attacks (FAB)
    of num_steps; lipschitz, a lower bound for a network of one layer after another, a forward pass
    and the layers' norms. Array: input_margin [N], pixel units. Raises UserError where lipschitz
    does not hold for the model.
    """
    x, y = _examples(subject.dataset.train, num_examples)
    if estimate == "lipschitz":
        if not isinstance(subject.model, _CHAINS):
            kind, chains = type(subject.model).__name__, ", ".join(c.__name__ for c in _CHAINS)
            raise UserError(f"margins by lipschitz are for {chains}, not for a {kind}")
        logits = _over(subject, lambda fn, rows: fn(rows["x"]), x, y)
        layers = spectra.layers(subject.model, subject.variables, subject.dataset.image_shape)
        found = margins.lipschitz(logits, y, layers, norm=norm, std=subject.model.std)
    elif estimate == "minimum_norm":
        nearest = partial(fab, num_steps=num_steps)

        def measure(fn, rows):
            keys = fold_in_each(jax.random.fold_in(subject.key, 2), rows["index"])
            return margins.minimum_norm(fn, rows["x"], rows["y"], keys, norm=norm, attack=nearest)

        found = _over(subject, measure, x, y)
    else:
        found = _over(
            subject, lambda fn, rows: margins.first_order(fn, rows["x"], rows["y"], norm=norm), x, y
        )
    found = np.asarray(found)
    if not np.isfinite(found).any():  # such as those of a network that collapsed
        return {"count": 0, "not_finite": len(found)}
    return {**summary(found), "input_margin": found}


def layer_spectra(subject: Subject) -> Found:
    """Standard deviation and maximum of each layer's singular values, and their means.

    Of dense layers, and of convolutions with circular padding (arXiv 1805.10408). Arrays:
    singular_values/LAYER, at most _SHOWN of each. Costs the layers' SVDs, on the host.
    """
    shape = subject.dataset.image_shape
    values = {
        name: np.asarray(spectra.circular(layer))
        for name, layer in spectra.layers(subject.model, subject.variables, shape).items()
    }
    deviations = {name: float(v.std()) for name, v in values.items()}
    maxima = {name: float(v.max()) for name, v in values.items()}
    return {
        **{f"standard_deviation/{name}": v for name, v in deviations.items()},
        **{f"maximum/{name}": v for name, v in maxima.items()},
        "mean_standard_deviation": float(np.mean(list(deviations.values()))),
        "mean_maximum": float(np.mean(list(maxima.values()))),
        **{f"singular_values/{name}": _thinned(v) for name, v in values.items()},
    }


_SHOWN = 200


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most _SHOWN of the values, at even steps from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(_SHOWN, len(values))).round().astype(int)]


def feature_change(
    subject: Subject, *, eps: float, norm: Norm = "linf", num_examples: int = 500
) -> Found:
    """‖h(x+δ) - h(x)‖ / ‖δ‖ of each layer, for random and adversarial δ (arXiv 2011.07478).

    On test images. Arrays: change_random/LAYER, change_adversarial/LAYER [N]. Costs PGD and four
    forward passes an example.
    """
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 0)
    features_fn = features.captured(subject.model, subject.variables)

    def measure(fn, rows):
        x, keys = rows["x"], fold_in_each(key, rows["index"])
        moved = {
            "random": features.random_neighbour(x, keys, eps=eps, norm=norm),
            "adversarial": pgd(fn, x, rows["y"], keys, eps=eps, norm=norm),
        }
        return {kind: features.change(features_fn, x, there) for kind, there in moved.items()}

    # A compiled program gives dicts back in the order of their keys.
    layers = list(features_fn(jnp.asarray(x[:1])))
    found: Found = {}
    for kind, changes in _over(subject, measure, x, y).items():
        by_layer = {name: changes[name] for name in layers}
        means = {name: float(np.nanmean(v)) for name, v in by_layer.items()}
        found |= {f"{kind}/{name}": mean for name, mean in means.items()}
        found[f"mean_{kind}"] = float(np.mean(list(means.values())))
        found |= {f"change_{kind}/{name}": v for name, v in by_layer.items()}
    return found


def clusters(subject: Subject, *, num_examples: int = 1000) -> Found:
    """Silhouette and intra/inter-class distance of the last layer's input, on test images.

    Arrays: projection [N,2] on the principal axes, label [N]. Costs a forward pass an example and
    N² distances.
    """
    x, y = _examples(subject.dataset.test, num_examples)
    features_fn = features.captured(subject.model, subject.variables)
    latents = _over(subject, lambda fn, rows: features_fn(rows["x"])["features"], x, y)
    return {
        "silhouette": latent.silhouette(latents, y),
        "distance_ratio": latent.distance_ratio(latents, y),
        "projection": latent.projection(latents).points,
        "label": y,
    }


def loss_energy(
    subject: Subject,
    *,
    eps: float,
    norm: Norm = "linf",
    num_examples: int = 500,
    num_samples: int = 10,
    num_steps: int = 10,
) -> Found:
    """Mean-square and oscillation energy of the loss on test images (arXiv 1911.06479).

    Costs num_samples forward passes and two ascents of num_steps an example.
    """
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


def gaps(subject: Subject, *, num_examples: int = 1000) -> Found:
    """Generalisation gaps: accuracy and cross-entropy on training images minus on test images.

    Costs a forward pass an example.
    """

    def measure(fn, rows):
        logits = fn(rows["x"])
        return {
            "accuracy": losses.correct(logits, rows["y"]),
            "cross_entropy": losses.cross_entropy(logits, rows["y"]),
        }

    splits = (subject.dataset.train, subject.dataset.test)
    return {**gaps_between(*(_over(subject, measure, *_examples(s, num_examples)) for s in splits))}


def jacobian_spectrum(
    subject: Subject, *, of: Literal["logits", "probabilities"] = "logits", num_examples: int = 200
) -> Found:
    """Mean singular values of the Jacobian on test images, the largest first.

    Costs K backward passes and an SVD of [K,D] an example.
    """
    x, y = _examples(subject.dataset.test, num_examples)

    def measure(fn, rows):
        return jacobian.singular_values(
            fn if of == "logits" else jacobian.probabilities(fn), rows["x"]
        )

    found = _over(subject, measure, x, y)
    return {f"{i}": float(value) for i, value in enumerate(found.mean(0))}


MEASUREMENTS: Mapping[str, Callable[..., Found]] = {
    "outputs": outputs,
    "margins": input_margins,
    "spectra": layer_spectra,
    "features": feature_change,
    "clusters": clusters,
    "energy": loss_energy,
    "gaps": gaps,
    "jacobian_spectrum": jacobian_spectrum,
}

# The numbers of each, or patterns of their names: what a study may ask for.
_SUMMARY = ("count", "not_finite", "minimum", "mean", "standard_deviation", "maximum", "q*")
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "outputs": (
        "mean_margin",
        "std_margin",
        "mean_confidence",
        "mean_entropy",
        "calibration_error",
    ),
    "margins": _SUMMARY,
    "spectra": ("standard_deviation/*", "maximum/*", "mean_standard_deviation", "mean_maximum"),
    "features": ("random/*", "adversarial/*", "mean_random", "mean_adversarial"),
    "clusters": ("silhouette", "distance_ratio"),
    "energy": ("mean_square", "oscillation"),
    "gaps": ("accuracy", "cross_entropy"),
    "jacobian_spectrum": ("[0-9]*",),
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

"""What the papers measure in a trained network, by name in a config.

Each is `measurement(subject, *, keywords) -> Numbers` on the first num_examples of a split, or on
all for 0, at most _BATCH_SIZE of them in memory at a time.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from robust_jax import data, energy, jacobian, losses, margins, models
from robust_jax.analysis import calibration, features, latent, spectra, surface
from robust_jax.analysis.summaries import summary
from robust_jax.attacks import Norm, fab, never, pgd
from robust_jax.batches import on_one_device
from robust_jax.errors import UserError
from robust_jax.keys import fold_in_each
from robust_jax.types import LogitsFn

# Numbers go to results.json and arrays, for figures, to measurements.npz. The array of_images/NAME
# [N] holds, for each image, what the number NAME is the mean of. It is kept for test images only:
# training images differ between seeds.
Numbers = dict[str, float | np.ndarray]
_BATCH_SIZE = 250
# Networks of one layer after another, for which margins by Lipschitz constants hold.
CHAINS = (models.Linear, models.MLP, models.CNN, models.LeNet5, models.MadryCNN, models.SmallCNN)


class Subject(NamedTuple):
    """A trained network, its data and a key."""

    model: nn.Module
    variables: Any
    logits_fn: LogitsFn
    dataset: data.Dataset
    key: jax.Array


def outputs(
    subject: Subject,
    *,
    split: Literal["train", "validation", "test"] = "test",
    num_examples: int = 1000,
) -> Numbers:
    """Output margins z_y - max_j z_j, gaps, confidence p_y, entropy and calibration error.

    Margins and confidence are those of arXiv 2011.07478, the rest is ours. The gap is z_y minus the
    mean of the wrong logits, and 1 - p_y is computed without cancellation. An example is saturated
    if its p_y is 1 in float32, where cross-entropy has no gradient left.
    Arrays: output_margin, gap, confidence [N]. Costs a forward pass an example.
    """
    x, y = _examples(getattr(subject.dataset, split), num_examples)
    logits = _on_examples(subject, lambda fn, rows: fn(rows["x"]), x, y)
    found = calibration.outcomes(logits, y)
    z, labels = jnp.asarray(logits), jnp.asarray(y)
    margin = np.asarray(losses.margin(z, labels))
    wrong = losses.complement(z, labels)
    gap = np.asarray(jnp.take_along_axis(z, labels[:, None], -1)[:, 0] - wrong.mean(-1))
    doubt = np.exp(jax.nn.logsumexp(wrong, -1) - jax.nn.logsumexp(z, -1))
    known = np.isfinite(found["top_probability"])  # not where a logit is NaN
    curve = calibration.reliability(found["top_probability"][known], found["correct"][known])
    return {
        **_means(
            of_images=split == "test",
            mean_margin=margin,
            mean_confidence=found["confidence"],
            mean_entropy=found["entropy"],
            saturated=losses.confidence(z, labels) == 1,
        ),
        "std_margin": float(margin.std()),
        "median_gap": float(np.median(gap)),
        "median_doubt": float(np.median(doubt)),
        "calibration_error": calibration.expected_calibration_error(curve),
        "output_margin": margin,
        "gap": gap,
        "confidence": found["confidence"],
    }


def input_margins(
    subject: Subject,
    *,
    estimate: Literal["first_order", "minimum_norm", "lipschitz", "clever"] = "first_order",
    split: Literal["train", "test"] = "train",
    num_examples: int = 500,
    norm: Norm = "l2",
    num_steps: int = 100,
    radius: float = 5.0,
    num_samples: int = 1024,
) -> Numbers:
    """Margins in the input space, by one of four estimates.

    clever follows arXiv 1907.11780: from the predicted class, unsigned and at most radius. It costs
    K backward passes for each of num_samples points. The others are ours, from the label.
    first_order is exact where a linear network is right, and costs K backward passes an example.
    minimum_norm is an upper bound and costs two attacks (FAB) of num_steps. lipschitz is a lower
    bound for a network of one layer after another, and costs a forward pass and the layers' norms.
    Array: input_margin [N], pixel units. Raises UserError if lipschitz does not hold for the model.
    """
    x, y = _examples(getattr(subject.dataset, split), num_examples)
    if estimate == "lipschitz":
        check_chain(type(subject.model))
        logits = _on_examples(subject, lambda fn, rows: fn(rows["x"]), x, y)
        layers = spectra.layers(subject.model, subject.variables, subject.dataset.image_shape)
        found = margins.lipschitz(logits, y, layers, norm=norm, std=subject.model.std)
    elif estimate == "minimum_norm":
        nearest = partial(fab, num_steps=num_steps)

        def measure(fn, rows):
            keys = fold_in_each(jax.random.fold_in(subject.key, 2), rows["index"])
            return margins.minimum_norm(fn, rows["x"], rows["y"], keys, norm=norm, attack=nearest)

        found = _on_examples(subject, measure, x, y)
    elif estimate == "clever":

        def distance(fn, rows):
            keys = fold_in_each(jax.random.fold_in(subject.key, 3), rows["index"])
            return margins.clever(
                fn, rows["x"], keys, norm=norm, eps=radius, num_samples=num_samples
            )

        found = _on_examples(subject, distance, x, y)
    else:
        found = _on_examples(
            subject, lambda fn, rows: margins.first_order(fn, rows["x"], rows["y"], norm=norm), x, y
        )
    found = np.asarray(found)
    if not np.isfinite(found).any():  # as for a collapsed network
        return {"count": 0, "not_finite": len(found)}
    of_images = {"of_images/mean": found} if split == "test" else {}
    return {**summary(found), "input_margin": found, **of_images}


def check_chain(model: type[nn.Module]) -> None:
    """Checks that margins by lipschitz hold for the model. Raises UserError otherwise."""
    if not issubclass(model, CHAINS):
        chains = ", ".join(chain.__name__ for chain in CHAINS)
        raise UserError(f"margins by lipschitz are for {chains}, not for a {model.__name__}")


def layer_spectra(subject: Subject) -> Numbers:
    """The spread of each layer's singular values: standard deviation, maximum and std/mean.

    relative_spread is std/mean with BatchNorm's scale folded into its layer, so no scale of the
    weights changes it (ours; arXiv 2011.07478 has the standard deviation). Dense layers are
    measured, and convolutions with circular padding (arXiv 1805.10408). Arrays:
    singular_values/LAYER, norms not folded, at most _SHOWN of each. Costs two SVDs of the layers,
    on the host.
    """
    plain, folded = (
        {
            name: np.asarray(spectra.circular(layer))
            for name, layer in spectra.layers(
                subject.model, subject.variables, subject.dataset.image_shape, fold_norms=fold
            ).items()
        }
        for fold in (False, True)
    )
    return {
        **{f"standard_deviation/{name}": float(v.std()) for name, v in plain.items()},
        **{f"maximum/{name}": float(v.max()) for name, v in plain.items()},
        **{f"relative_spread/{name}": float(v.std() / v.mean()) for name, v in folded.items()},
        **{f"singular_values/{name}": _thinned(v) for name, v in plain.items()},
    }


_SHOWN = 200


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most _SHOWN of the values, at even steps from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(_SHOWN, len(values))).round().astype(int)]


def feature_change(
    subject: Subject, *, eps: float, norm: Norm = "linf", num_examples: int = 500
) -> Numbers:
    """‖h(x+δ) - h(x)‖ / ‖δ‖ of each layer, for random and adversarial δ (arXiv 2011.07478).

    relative_… is also divided by ‖h(x)‖. adversarial_over_random is the ratio of the two means, 1
    if a layer is equally smooth in all directions. Both are ours and free of the layer's scale. On
    test images. Arrays: change_random/LAYER, change_adversarial/LAYER and the same with relative_
    [N]. Costs PGD and eight forward passes an example.
    """
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 0)
    features_fn = features.captured(subject.model, subject.variables)

    def measure(fn, rows):
        x, keys = rows["x"], fold_in_each(key, rows["index"])
        moved = {
            "random": features.point_at_distance(x, keys, eps=eps, norm=norm),
            "adversarial": pgd(fn, x, rows["y"], keys, eps=eps, norm=norm),
        }
        return {
            f"{prefix}{kind}": features.change(features_fn, x, there, relative=bool(prefix))
            for kind, there in moved.items()
            for prefix in ("", "relative_")
        }

    changes = _on_examples(subject, measure, x, y)
    # A compiled program sorts dicts by key; this call keeps the order of the layers.
    of_one = features_fn(jnp.asarray(x[:1]))
    layers = [
        layer
        for layer in of_one
        if layer != "features"  # a layer that also has a name counts once
        or not any(np.array_equal(of_one[layer], h) for n, h in of_one.items() if n != layer)
    ]
    found = {f"{kind}/{layer}": changes[kind][layer] for kind in changes for layer in layers}
    for layer in layers:
        adversarial, random = (changes[kind][layer] for kind in ("adversarial", "random"))
        random = np.where(np.isnan(adversarial), np.nan, random)  # both from the same images
        ratio = np.nanmean(adversarial) / np.nanmean(random)
        # The ratio of the means, plus each image's first-order effect on it.
        found[f"adversarial_over_random/{layer}"] = ratio + (
            adversarial - ratio * random
        ) / np.nanmean(random)
    return {
        # An image that did not move is NaN, and then there is no interval over images.
        **_means(mean=np.nanmean, **found),
        **{
            f"{prefix}change_{kind}/{layer}": changes[f"{prefix}{kind}"][layer]
            for prefix in ("", "relative_")
            for kind in ("random", "adversarial")
            for layer in layers
        },
    }


def clusters(subject: Subject, *, num_examples: int = 1000) -> Numbers:
    """Silhouette and intra/inter-class distance of the last layer's input, on test images.

    The numbers are ours; arXiv 1903.09799 shows the t-SNE, of CIFAR-10. Arrays: projection [N,2] on
    the principal axes, tsne [N,2], label [N]. Costs a forward pass an example, N² distances and
    seconds of t-SNE.
    """
    x, y = _examples(subject.dataset.test, num_examples)
    features_fn = features.captured(subject.model, subject.variables)
    latents = _on_examples(subject, lambda fn, rows: features_fn(rows["x"])["features"], x, y)
    return {
        "silhouette": latent.silhouette(latents, y),
        "distance_ratio": latent.distance_ratio(latents, y),
        "projection": latent.projection(latents),
        "tsne": latent.tsne(latents),
        "label": y,
    }


def loss_energy(
    subject: Subject,
    *,
    eps: float,
    norm: Norm = "linf",
    label_free: bool = False,
    num_examples: int = 500,
    num_samples: int = 10,
    num_steps: int = 10,
) -> Numbers:
    """The energies of the loss on test images, and the term of adversarial training, `rise`.

    Ours, after arXiv 1911.06479 (withdrawn; see `robust_jax.energy`). label_free: takes
    KL(p(x) ‖ p(x+r)) instead of the cross-entropy. Costs num_samples forward passes and twice as
    many gradients, and four ascents of num_steps an example (three if label_free).
    """
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 1)
    drawn: dict[str, Callable[..., jax.Array]] = {
        "mean_square": energy.mean_square,
        "total_variation": energy.total_variation,
        "total_variation_squared": partial(energy.total_variation, squared=True),
    }
    ascended = (energy.oscillation, energy.rise, energy.path)

    def measure(fn, rows):
        args = (
            fn,
            rows["x"],
            None if label_free else rows["y"],
            fold_in_each(key, rows["index"]),
        )
        around: dict[str, Any] = {"eps": eps, "norm": norm}
        return {
            **{name: f(*args, **around, num_samples=num_samples) for name, f in drawn.items()},
            **{f.__name__: f(*args, **around, num_steps=num_steps) for f in ascended},
        }

    return _means(**_on_examples(subject, measure, x, y))


def interior(
    subject: Subject,
    *,
    eps: float,
    norm: Norm = "linf",
    num_examples: int = 500,
    num_steps: int = 10,
    num_pieces: int = 4,
) -> Numbers:
    """Mean cross-entropy on the way to the worst point of the ball, on test images (ours).

    loss/PERCENT is the loss at that part of the way. worst_inside is the share of examples whose
    loss is largest before the end, where arXiv 1911.06479 says adversarial training does not look.
    The array loss_along is [N,num_pieces+1]. Costs an ascent of num_steps and num_pieces + 1
    forward passes an example.
    """
    x, y = _examples(subject.dataset.test, num_examples)
    key = jax.random.fold_in(subject.key, 4)
    shares = np.linspace(0, 1, num_pieces + 1)

    def measure(fn, rows):
        keys = fold_in_each(key, rows["index"])
        worst = pgd(
            fn, rows["x"], rows["y"], keys, eps=eps, norm=norm, num_steps=num_steps, criterion=never
        )
        return surface.loss_along(fn, rows["x"], rows["y"], worst, steps=shares.tolist())

    along = np.asarray(_on_examples(subject, measure, x, y))
    return {
        **_means(
            **{f"loss/{100 * share:.0f}": v for share, v in zip(shares, along.T, strict=True)},
            worst_inside=along[:, :-1].max(-1) > along[:, -1],
        ),
        "loss_along": along,
    }


def gaps(subject: Subject, *, num_examples: int = 1000) -> Numbers:
    """Generalisation gaps: accuracy and cross-entropy on training images minus on test images.

    The accuracy gap follows arXiv 2011.07478; the cross-entropy gap is ours. A test image's gap is
    to the mean over training images. Costs a forward pass an example.
    """

    def measure(fn, rows):
        logits = fn(rows["x"])
        return {
            "accuracy": losses.correct(logits, rows["y"]),
            "cross_entropy": losses.cross_entropy(logits, rows["y"]),
        }

    splits = (subject.dataset.train, subject.dataset.test)
    train, test = (_on_examples(subject, measure, *_examples(s, num_examples)) for s in splits)
    return _means(**{name: train[name].mean() - test[name] for name in train})


def jacobian_spectrum(
    subject: Subject, *, of: Literal["logits", "probabilities"] = "logits", num_examples: int = 200
) -> Numbers:
    """Mean singular values of the Jacobian on test images, the largest first (ours).

    arXiv 2011.13538 has only norms. Costs K backward passes and an SVD of [K,D] an example.
    """
    x, y = _examples(subject.dataset.test, num_examples)

    def measure(fn, rows):
        return jacobian.singular_values(
            fn if of == "logits" else jacobian.probabilities(fn), rows["x"]
        )

    found = _on_examples(subject, measure, x, y)
    return _means(**{f"{i}": values for i, values in enumerate(found.T)})


MEASUREMENTS: Mapping[str, Callable[..., Numbers]] = {
    "outputs": outputs,
    "margins": input_margins,
    "spectra": layer_spectra,
    "features": feature_change,
    "clusters": clusters,
    "energy": loss_energy,
    "interior": interior,
    "gaps": gaps,
    "jacobian_spectrum": jacobian_spectrum,
}

# The numbers of each measurement, by name or pattern, that a study may ask for.
_SUMMARY = ("count", "not_finite", "minimum", "mean", "standard_deviation", "maximum", "q*")
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "outputs": (
        "mean_margin",
        "std_margin",
        "median_gap",
        "mean_confidence",
        "median_doubt",
        "saturated",
        "mean_entropy",
        "calibration_error",
    ),
    "margins": _SUMMARY,
    "spectra": ("standard_deviation/*", "maximum/*", "relative_spread/*"),
    "features": (
        "random/*",
        "adversarial/*",
        "relative_random/*",
        "relative_adversarial/*",
        "adversarial_over_random/*",
    ),
    "clusters": ("silhouette", "distance_ratio"),
    "energy": (
        "mean_square",
        "total_variation",
        "total_variation_squared",
        "oscillation",
        "rise",
        "path",
    ),
    "interior": ("loss/*", "worst_inside"),
    "gaps": ("accuracy", "cross_entropy"),
    "jacobian_spectrum": ("[0-9]*",),
}


def _means(*, of_images: bool = True, mean: Callable = np.mean, **values: Any) -> Numbers:
    """The mean of each [N] and, if of_images, the values that it is the mean of."""
    found = {name: np.asarray(v, np.float32) for name, v in values.items()}
    kept = {f"of_images/{name}": v for name, v in found.items()} if of_images else {}
    return {**{name: float(mean(v, dtype=np.float64)) for name, v in found.items()}, **kept}


def _examples(
    split: data.Split | data.Streamed, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first labelled examples of a split; all of them for 0."""
    images, labels = split.take(split.labeled[: num_examples or None])
    return np.asarray(data.to_pixels(images)), labels


def _on_examples(subject: Subject, fn: Callable, x: np.ndarray, y: np.ndarray) -> Any:
    rows = {"x": x, "y": y, "index": np.arange(len(y))}
    return on_one_device(subject.logits_fn, _BATCH_SIZE)(fn)(rows)

"""AutoAttack and the audit on the networks that the authors of arXiv 1907.11780 trained on MNIST.

    python -m benchmarks.authors_networks --reference=../shared/reference --out=authors.json

Their networks "plain", "constraint" and "regularised" (a CNN) and a linear one, as npz files (see
`load`); nobody has published their accuracy under AutoAttack. Attacks MNIST's first test images in
l2 at each eps; beside AutoAttack, fewer of them get the audit and PGD, on cross-entropy (as
published, and ours) and on the margin. A command that was stopped continues at the network and eps
where it was. Hours on 2 CPU cores.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_jax import attacks, audit, data, losses, models
from robust_jax.app.results import audit_to_json, device, versions
from robust_jax.files import write_json
from robust_jax.types import Images, Labels, LogitsFn

# By file name, the test accuracy in percent that the authors report.
NETWORKS = {
    "mnist_cnn_plain": 99.14,
    "mnist_cnn_constraint": 99.29,
    "mnist_cnn_regularized": 99.25,
    "mnist_linear_plain": 92.55,
}
SIZES = (0.5, 1.0, 1.5, 2.0)
# Layers of the npz files, and what models.SmallCNN and models.Linear call them.
_CNN = {f"conv{i + 1}": f"Conv_{i}" for i in range(4)} | {
    "fc1": "Dense_0",
    "fc2": "Dense_1",
    "fc3": "head",
}
_LINEAR = {"fc": "head"}


class Logits(NamedTuple):
    """A network with its variables, as the library takes it."""

    model: Any
    variables: Any

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        return self.model.apply(self.variables, x)


def load(path: Path) -> LogitsFn:
    """A network from an npz file with LAYER/kernel (HWIO, or [in, out]) and LAYER/bias.

    The first dense layer's rows are those of a flattened [H,W,C].
    """
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    layers = _CNN if "conv1/kernel" in arrays else _LINEAR
    params = {
        ours: {kind: jnp.asarray(arrays[f"{theirs}/{kind}"]) for kind in ("kernel", "bias")}
        for theirs, ours in layers.items()
    }
    model = (models.SmallCNN if layers is _CNN else models.Linear)(num_classes=10)
    return Logits(model, {"params": params})


def mnist(num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test images, in [0,1], and their labels."""
    # Streaming, since the training set is not needed.
    test = data.load("tfds:mnist", validation_size=1000, streaming=True).test
    images, labels = test.take(np.arange(min(num_examples, test.size)))
    return np.asarray(data.to_pixels(images)), labels


def accuracy(logits_fn: LogitsFn, x: np.ndarray, y: np.ndarray, batch_size: int = 500) -> float:
    """Clean accuracy, batch_size examples at a time."""
    right = [
        losses.correct(logits_fn(x[i : i + batch_size]), jnp.asarray(y[i : i + batch_size]))
        for i in range(0, len(y), batch_size)
    ]
    return float(np.concatenate(right).mean(dtype=np.float64))


def published_pgd(
    logits_fn: LogitsFn,
    x: Images,
    y: Labels,
    keys: jax.Array,
    *,
    eps: float,
    num_steps: int,
    step_size: float,
) -> Images:
    """The authors' PGD (advertorch's, in l2), from a random image in the ball to the last point.

    Its steps shrink if a gradient is smaller than 1e-6, for instance when logits saturate.
    """
    l2 = attacks.NORMS["l2"]

    def one(x, y, key):
        def step(x_adv, _):
            gradient = jax.grad(lambda z: losses.cross_entropy(logits_fn(z[None]), y[None])[0])(
                x_adv
            )
            move = step_size * gradient / jnp.maximum(l2.size(gradient), 1e-6)
            return l2.project_to_ball_and_box(x_adv + move, x, eps), None

        start = l2.project_to_ball_and_box(jax.random.uniform(key, x.shape), x, eps)
        return jax.lax.scan(step, start, length=num_steps)[0]

    return jax.jit(jax.vmap(one))(x, y, keys)


def evaluate(
    logits_fn: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: float,
    num_audited: int = 100,
    num_for_pgd: int = 200,
    num_steps: int = 1000,
    step_size: float = 0.01,
    state_path: Path | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """PGD as published and on two losses, AutoAttack and the audit, in l2 at eps.

    num_for_pgd: How many of the images PGD attacks; 1,000 steps cost as much as AutoAttack.
    keywords: AutoAttack's.
    """
    start, key = time.perf_counter(), jax.random.key(0)
    keys = jax.random.split(key, len(x))
    few = slice(num_for_pgd)

    steps = {"eps": eps, "num_steps": num_steps, "step_size": step_size}

    def held(attack: Callable, **how: Any) -> float:
        x_adv = attack(logits_fn, x[few], y[few], keys[few], **steps, **how)
        return accuracy(logits_fn, np.asarray(x_adv), y[few])

    found = {
        "pgd_published": held(published_pgd),
        "pgd_cross_entropy": held(attacks.pgd, norm="l2", loss=losses.cross_entropy),
        "pgd_margin": held(attacks.pgd, norm="l2", loss=losses.margin_loss),
    }
    result = attacks.autoattack(
        logits_fn, x, y, keys, eps=eps, norm="l2", state_path=state_path, **keywords
    )
    audited = audit(
        logits_fn,
        x[:num_audited],
        y[:num_audited],
        key,
        eps=eps,
        norm="l2",
        training_loss=losses.cross_entropy,
    )
    return {
        "eps": eps,
        "clean": accuracy(logits_fn, x, y),
        **found,
        "autoattack": float(result.robust.mean()),
        "autoattack_where_pgd": float(result.robust[few].mean()),
        "by_member": result.robust_accuracy,
        "warnings": list(result.warnings),
        "audit": audit_to_json(audited),
        "count": len(y),
        "count_pgd": len(y[few]),
        "seconds": time.perf_counter() - start,
    }


def main(
    reference: Path,
    out: Path,
    num_examples: int,
    networks: tuple[str, ...],
    sizes: tuple[float, ...],
    num_for_pgd: int,
) -> None:
    results = json.loads(out.read_text()) if out.exists() else {}
    x, y = mnist(num_examples)
    results["made_by"] = {"device": device(), **versions("jax", "jaxlib", "numpy")}
    for name in networks:
        logits_fn = load(reference / f"{name}.npz")
        for eps in sizes:
            found = results.setdefault(name, {})
            done = found.get(f"{eps:g}", {})
            if (done.get("count"), done.get("count_pgd")) == (len(y), min(num_for_pgd, len(y))):
                print(f"{name} at {eps:g}: done before", flush=True)
                continue
            print(f"{name} at {eps:g}, {len(y)} images …", flush=True)
            state = out.with_name(f"{out.stem}_{name}_{eps:g}.npz")
            found[f"{eps:g}"] = evaluate(
                logits_fn, x, y, eps=eps, num_for_pgd=num_for_pgd, state_path=state
            )
            write_json(out, results)
            state.unlink(missing_ok=True)
            print(_line(name, found[f"{eps:g}"]), flush=True)


def _line(name: str, found: dict[str, Any]) -> str:
    shares = ", ".join(
        f"{what.replace('_', ' ')} {100 * found[what]:.1f}"
        for what in (
            *("clean", "pgd_published", "pgd_cross_entropy", "pgd_margin"),
            *("autoattack_where_pgd", "autoattack"),
        )
    )
    return (
        f"{name} at {found['eps']:g}, in %: {shares} ({found['count_pgd']} images for PGD, "
        f"{found['count']} for AutoAttack); audit: {found['audit']['verdict']}; "
        f"{found['seconds']:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"))
    parser.add_argument("--out", type=Path, default=Path("authors.json"))
    parser.add_argument("--num_examples", type=int, default=1000)
    parser.add_argument("--num_for_pgd", type=int, default=200)
    parser.add_argument("--networks", nargs="+", default=tuple(NETWORKS), choices=tuple(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES)
    flags = parser.parse_args()
    main(
        flags.reference,
        flags.out,
        flags.num_examples,
        tuple(flags.networks),
        tuple(flags.sizes),
        flags.num_for_pgd,
    )

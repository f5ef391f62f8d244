"""AutoAttack here and in torchattacks, on the same weights and points, as a markdown table.

    python benchmarks/compare_autoattack.py --norm=linf --eps=0.1

Needs the bench extra (torch, torchattacks). Trains a small network on digits, copies its weights
to PyTorch, and runs each of AutoAttack's members alone on both sides, with the budgets of the
paper but for Square's queries (5000 take torchattacks minutes). For all of them together, ours is
a run of AutoAttack, theirs what stands after every member, as each starts from the clean image.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchattacks

from robust_jax import data, losses, models
from robust_jax.attacks import autoattack


def train(dataset: data.Dataset, num_steps: int):
    """(model, params) of the CNN after num_steps of Adam on random batches of 128."""
    model = models.CNN(
        num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std
    )  # fmt: skip
    images, labels = data.to_pixels(dataset.train.images), jnp.asarray(dataset.train.labels)
    params = model.init(jax.random.key(0), images[:1])["params"]
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, key):
        rows = jax.random.randint(key, (128,), 0, len(images))

        def mean_loss(params):
            logits = model.apply({"params": params}, images[rows])
            return losses.cross_entropy(logits, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), num_steps):
        params, state = step(params, state, key)
    return model, params


class TorchCNN(torch.nn.Module):
    """The same network in PyTorch, images [B,C,H,W]."""

    def __init__(self, params, mean, std):
        super().__init__()
        self.weights = torch.nn.ParameterDict(
            {
                f"{name}_{part}": torch.tensor(np.asarray(array))
                for name, layer in params.items()
                for part, array in layer.items()
            }
        )
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def forward(self, x):
        x = (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        for name in ("Conv_0", "Conv_1"):
            kernel = self.weights[f"{name}_kernel"].permute(3, 2, 0, 1)
            x = torch.relu(torch.conv2d(x, kernel, self.weights[f"{name}_bias"], padding="same"))
            if min(x.shape[2:]) >= 8:
                x = torch.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).flatten(1)
        x = torch.relu(x @ self.weights["Dense_0_kernel"] + self.weights["Dense_0_bias"])
        return x @ self.weights["head_kernel"] + self.weights["head_bias"]


def torch_members(model, norm: str, eps: float, num_classes: int, num_queries: int) -> dict:
    """torchattacks' attacks with AutoAttack's budgets; its own AutoAttack takes 10 steps."""
    common = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    return {
        "apgd_ce": torchattacks.APGD(model, steps=100, loss="ce", **common),
        "apgd_t": torchattacks.APGDT(model, steps=100, n_classes=num_classes, **common),
        "fab_t": torchattacks.FAB(
            model, steps=100, multi_targeted=True, n_classes=num_classes, **common
        ),
        "square": torchattacks.Square(model, n_queries=num_queries, resc_schedule=False, **common),
    }


def torch_robust(model, attack, x, y) -> np.ndarray:
    """Whether each point stands after an attack on the ones classified right, [B]."""
    robust = (model(x).argmax(-1) == y).numpy()
    standing = np.flatnonzero(robust)
    x_adv = attack(x[standing], y[standing])
    with torch.no_grad():
        robust[standing] = (model(x_adv).argmax(-1) == y[standing]).numpy()
    return robust


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--eps", type=float, default=0.1, help="pixel units (pixels in [0,1])")
    parser.add_argument("--points", type=int, default=500, help="test points, at most 500")
    parser.add_argument("--num_queries", type=int, default=1000, help="of Square; the paper: 5000")
    parser.add_argument("--train_steps", type=int, default=1000)
    flags = parser.parse_args()

    dataset = data.load("digits", validation_size=100)
    model, params = train(dataset, flags.train_steps)
    x = np.asarray(data.to_pixels(dataset.test.images[: flags.points]))
    y = dataset.test.labels[: flags.points]
    torch_model = TorchCNN(params, dataset.mean, dataset.std).eval().requires_grad_(False)
    torch_x = torch.tensor(x).permute(0, 3, 1, 2)
    torch_y = torch.tensor(y, dtype=torch.long)

    def logits_fn(x):
        return model.apply({"params": params}, x)

    def run_ours(version):
        return autoattack(
            logits_fn, x, y, jax.random.key(0),
            eps=flags.eps, norm=flags.norm, version=version, batch_size=250, progress=False,
            overrides={"square": {"num_queries": flags.num_queries}},
        ).robust  # fmt: skip

    difference = np.abs(np.asarray(logits_fn(x)) - torch_model(torch_x).numpy()).max()
    if difference > 1e-3:
        raise SystemExit(f"the two networks' logits differ by {difference:g}")
    others = torch_members(
        torch_model, flags.norm, flags.eps, dataset.num_classes, flags.num_queries
    )

    print(f"digits CNN, {flags.norm} eps {flags.eps:g}, {len(x)} points; robust accuracy in %\n")
    columns = (
        "attack", "robust_jax", "torchattacks", "only ours breaks", "only theirs breaks",
        "ours, s", "theirs, s",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    standing = np.ones(len(x), bool)
    for name, attack in others.items():
        ours, seconds = timed(run_ours, version=(name,))
        theirs, their_seconds = timed(torch_robust, torch_model, attack, torch_x, torch_y)
        standing &= theirs
        print_row(name, ours, theirs, f"{seconds:.0f}", f"{their_seconds:.0f}")
    ours, seconds = timed(run_ours, version="standard")
    print_row("all", ours, standing, f"{seconds:.0f}", "")


def timed(function, *arguments, **keywords):
    """(what the function returns, how many seconds it took, compilation included)."""
    started = time.perf_counter()
    return function(*arguments, **keywords), time.perf_counter() - started


def print_row(name: str, ours: np.ndarray, theirs: np.ndarray, *seconds: str) -> None:
    cells = (
        name, f"{100 * ours.mean():.1f}", f"{100 * theirs.mean():.1f}",
        (theirs & ~ours).sum(), (ours & ~theirs).sum(), *seconds,
    )  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()

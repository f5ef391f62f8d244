"""Our attacks beside other people's, on the same weights, points and budgets, as markdown tables.

    python -m benchmarks.compare_attacks --model=lenet5 --workdir=runs/mnist_at --eps=0.2 \\
        --out=runs/compare_linf --reference=../auto-attack
    python -m benchmarks.compare_attacks --model=preact_resnet18 --weights=runs/resnet18.npz \\
        --norm=l2 --eps=0.1 --points=64 --num_steps=20 --num_targets=3 --num_queries=200 \\
        --out=runs/compare_resnet_l2 --reference=../auto-attack

Needs the extras train and bench. lenet5: the best checkpoint of a finished run of
configs/mnist_lenet5_at.py or the like. preact_resnet18: CIFAR-10, trained here for a few minutes
if --weights does not exist yet. --reference names a checkout of github.com/fra31/auto-attack,
which is then one of the peers. Every batch measured is kept in --out and not measured again, so a
long comparison may be stopped, and more attacks, peers and seeds added. Times are comparable only
if both sides were measured in one call. docs/attack_comparison.md has our tables.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

from benchmarks import attack_peers, torch_models
from benchmarks.attack_peers import Budget
from benchmarks.timing import heading
from robust_jax import attacks, data, models
from robust_jax.app import subject
from robust_jax.attacks._autoattack import MEMBERS

PEERS = {
    "torchattacks": attack_peers.from_torchattacks,
    "foolbox": attack_peers.from_foolbox,
    "art": attack_peers.from_art,
}
# How far beyond eps rounding may take a point, relative and in pixel units.
_SLACK = 1e-4, 1e-6
# How many of the points in dispute a note names.
_NUM_NAMED = 8


class Side(NamedTuple):
    """predict: x [N,H,W,C] -> labels [N]; attacks by name: (x, y [N], keys [N], seed) -> x_adv."""

    name: str
    predict: Callable
    attacks: dict[str, Callable]


class Outcome(NamedTuple):
    """What an attack does to N points: which are misclassified in the end, and how far away.

    seconds has a value for each batch.
    """

    broken: np.ndarray
    distance: np.ndarray
    seconds: np.ndarray


def lenet5(flags) -> tuple[nn.Module, Any, data.Dataset, torch.nn.Module]:
    """(model, variables, data, PyTorch's network) of a finished run."""
    run = subject.load(flags.workdir)
    return run.model, run.variables, run.dataset, torch_models.LeNet5(run.model)


def preact_resnet18(flags) -> tuple[nn.Module, Any, data.Dataset, torch.nn.Module]:
    """The same, trained in PyTorch, which takes a fraction of our time on a CPU."""
    dataset = data.load("tfds:cifar10", validation_size=1000)
    model = models.PreActResNet(num_classes=dataset.num_classes, mean=dataset.mean, std=dataset.std)
    net = torch_models.PreActResNet(model)
    if Path(flags.weights).exists():
        with np.load(flags.weights, allow_pickle=False) as saved:
            net.load_state_dict({name: torch.tensor(saved[name]) for name in saved})
    else:
        torch_models.train(net, dataset.train, flags.train_steps)
        np.savez(flags.weights, **{name: t.numpy() for name, t in net.state_dict().items()})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    return model, torch_models.to_flax(net, shapes), dataset, net


MODELS = {"lenet5": lenet5, "preact_resnet18": preact_resnet18}


def our_side(logits_fn: Callable, budget: Budget) -> Side:
    """robust_jax; AutoAttack's members by `autoattack`, which drops what each has broken."""
    norm, eps, batch_size = budget.norm, budget.eps, budget.batch_size
    steps = {"num_steps": budget.num_steps}
    targeted = {**steps, "num_targets": budget.num_targets}
    overrides = {
        "apgd_ce": {**steps, "num_restarts": budget.num_restarts},
        "apgd_dlr": {**steps, "num_restarts": budget.num_restarts},
        "apgd_t": targeted,
        "fab": steps,
        "fab_t": targeted,
        "square": {"num_queries": budget.num_queries},
    }

    def ensemble(version):
        def run(x, y, keys, _):
            return attacks.autoattack(
                logits_fn,
                x,
                y,
                keys,
                eps=eps,
                norm=norm,
                version=version,
                batch_size=batch_size,
                overrides=overrides,
                progress=False,
            ).x_adv

        return run

    def single(attack):
        compiled = jax.jit(partial(attack, logits_fn, norm=norm))

        def run(x, y, keys, _):
            rows = np.minimum(np.arange(batch_size), len(x) - 1)  # one shape, compiled once
            return np.asarray(compiled(x[rows], y[rows], keys[rows]))[: len(x)]

        return run

    pgd = partial(attacks.pgd, eps=eps, step_size=budget.step_size, num_steps=budget.num_pgd_steps)
    fab = partial(attacks.fab, **steps)
    ours = {
        **{name: ensemble((name,)) for name in MEMBERS},
        "standard": ensemble("standard"),
        "pgd": single(pgd),
        "nearest_fab": single(partial(fab, num_targets=None)),
        "nearest_fab_t": single(partial(fab, num_targets=budget.num_targets)),
        "nearest_deepfool": single(attacks.deepfool),
        "nearest_carlini_wagner": single(
            partial(attacks.carlini_wagner, num_steps=budget.num_cw_steps)
        ),
    }
    return Side("ours", jax.jit(lambda x: logits_fn(x).argmax(-1)), ours)


def torch_side(name: str, net: torch.nn.Module, their_attacks: attack_peers.Attacks) -> Side:
    """A package on the same network in PyTorch."""

    def predict(x):
        with torch.no_grad():
            return net(torch_models.to_torch(x)).argmax(-1).numpy()

    def wrapped(attack):
        def run(x, y, _, seed):
            labels = torch.tensor(y, dtype=torch.long)
            return torch_models.to_numpy(attack(torch_models.to_torch(x), labels, seed))

        return run

    return Side(name, predict, {key: wrapped(attack) for key, attack in their_attacks.items()})


def measure(
    sides: Sequence[Side], attack: str, x, y, seed: int, budget: Budget, folder: Path
) -> list[Outcome]:
    """One attack on the points by each side, a batch at a time, in turns.

    A batch that the folder holds is read from there. Each side attacks the points that its network
    gets right. A point is broken if its side's network gets x_adv wrong, and x_adv is in the box
    and, for an attack with a radius, within eps.
    """
    keys = jax.random.split(jax.random.key(seed), len(x))
    parts = []
    for start in range(0, len(x), budget.batch_size):
        rows = slice(start, start + budget.batch_size)
        parts.append([])
        for side in sides:
            path = folder / f"{side.name}-{attack}-{seed}-{start}.npz"
            if not path.exists():
                outcome = _measure_batch(side, attack, x[rows], y[rows], keys[rows], seed, budget)
                np.savez(path, **outcome._asdict())
            with np.load(path, allow_pickle=False) as saved:
                parts[-1].append(Outcome(**saved))
    return [
        Outcome(*(np.concatenate(field) for field in zip(*of_side, strict=True)))
        for of_side in zip(*parts, strict=True)
    ]


def _measure_batch(side, attack, x, y, keys, seed, budget) -> Outcome:
    right = np.flatnonzero(side.predict(x) == y)
    started = time.perf_counter()
    x_adv = x[right]
    if len(right):
        x_adv = side.attacks[attack](x_adv, y[right], keys[right], seed)
    seconds = time.perf_counter() - started
    size = np.asarray(attacks.distances(x[right], x_adv, norm=budget.norm))
    valid = (x_adv >= 0).all((1, 2, 3)) & (x_adv <= 1).all((1, 2, 3))
    if not _is_nearest(attack):
        relative, absolute = _SLACK
        valid &= size <= budget.eps * (1 + relative) + absolute
    broken, distance = np.ones(len(x), bool), np.zeros(len(x), np.float32)
    broken[right] = (side.predict(x_adv) != y[right]) & valid
    distance[right] = np.where(broken[right], size, np.inf)
    return Outcome(broken, distance, np.array([seconds]))


def bounded_row(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[str]:
    """Robust accuracy and how many points only one side breaks; an outcome for each seed."""
    broken, their_broken = (np.stack([o.broken for o in side]) for side in (ours, theirs))
    accuracy, their_accuracy = 100 * (1 - broken.mean(1)), 100 * (1 - their_broken.mean(1))
    return [
        _over_seeds(accuracy),
        _over_seeds(their_accuracy),
        _over_seeds(accuracy - their_accuracy),
        _over_seeds((broken & ~their_broken).sum(1)),
        _over_seeds((~broken & their_broken).sum(1)),
    ]


def nearest_row(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[str]:
    """How often a point is found, and distances where both sides find one and x is not one."""
    rows = []
    for one, other in zip(ours, theirs, strict=True):
        both = one.broken & other.broken & (one.distance > 0)
        distance, their_distance = one.distance[both], other.distance[both]
        rows.append(
            (
                100 * one.broken.mean(),
                100 * other.broken.mean(),
                np.median(distance),
                np.median(their_distance),
                np.median(distance / their_distance),
                100 * (distance < 0.99 * their_distance).mean(),
                100 * (distance > 1.01 * their_distance).mean(),
            )
        )
    digits = (1, 1, 4, 4, 4, 1, 1)
    columns = (np.array(column) for column in zip(*rows, strict=True))
    return [_over_seeds(column, n) for column, n in zip(columns, digits, strict=True)]


COLUMNS = {
    bounded_row: (
        "robust accuracy, %: ours",
        "theirs",
        "difference",
        "only ours breaks",
        "only theirs breaks",
    ),
    nearest_row: (
        "found, %: ours",
        "theirs",
        "median distance: ours",
        "theirs",
        "median ratio",
        "ours nearer by 1 %, % of points",
        "theirs",
    ),
}
SECONDS = "seconds: ours", "theirs", "median ratio of batches", "range"


def seconds_row(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[str]:
    """The time of a seed's points, and the ratio of a batch's times, compilation included."""
    taken, their_taken = (np.stack([o.seconds for o in side]) for side in (ours, theirs))
    ratio = taken / their_taken
    return [
        f"{taken.sum(1).mean():.3g}",
        f"{their_taken.sum(1).mean():.3g}",
        f"{np.median(ratio):.2f}",
        f"{ratio.min():.2f} to {ratio.max():.2f}",
    ]


def disagreements(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> str:
    """The points that one side breaks with every seed and the other with none."""
    broken, their_broken = (np.stack([o.broken for o in side]) for side in (ours, theirs))
    only = {
        "ours": broken.all(0) & ~their_broken.any(0),
        "theirs": their_broken.all(0) & ~broken.any(0),
    }
    return "; ".join(
        f"only {side}: {_named(np.flatnonzero(points))}"
        for side, points in only.items()
        if points.any()
    )


def main() -> None:
    flags = _parse()
    model, variables, dataset, net = MODELS[flags.model](flags)
    net = torch_models.from_flax(net, variables)
    logits_fn = jax.jit(lambda x: model.apply(variables, x))
    x = np.asarray(data.to_pixels(dataset.test.images[: flags.points]))
    y = dataset.test.labels[: flags.points]
    check_networks(logits_fn, net, x, y, flags)

    budget = Budget(
        num_classes=dataset.num_classes,
        **{name: getattr(flags, name) for name in Budget._fields if name != "num_classes"},
    )
    folder = Path(flags.out)
    claim(folder, {"model": flags.model, "points": len(x), **budget._asdict()})
    ours = our_side(logits_fn, budget)
    if unknown := set(flags.attacks) - set(ours.attacks):
        raise SystemExit(f"error: no attack {unknown}; choices: {', '.join(ours.attacks)}")
    peers = [torch_side(name, net, PEERS[name](net, budget)) for name in flags.peers]
    if flags.reference:
        reference = attack_peers.from_reference(net, budget, flags.reference)
        peers.insert(0, torch_side("reference", net, reference))

    notes, disputed, header = [], [], None
    for attack in flags.attacks:
        row = nearest_row if _is_nearest(attack) else bounded_row
        if COLUMNS[row] is not header:
            header = COLUMNS[row]
            print()
            print(heading(" | ".join(("attack", "theirs", *header, *SECONDS))), flush=True)
        able = [peer for peer in peers if attack in peer.attacks]
        by_seed = [
            measure([ours, *able], attack, x, y, seed, budget, folder)
            for seed in range(flags.seeds)
        ]
        our_outcomes, *their_outcomes = zip(*by_seed, strict=True)
        for peer, outcomes in zip(able, their_outcomes, strict=True):
            _print_row(
                attack,
                peer.name,
                *row(our_outcomes, outcomes),
                *seconds_row(our_outcomes, outcomes),
            )
            if note := disagreements(our_outcomes, outcomes):
                notes.append(f"- {attack}, {peer.name}: {note}")
            for seed, (one, other) in enumerate(zip(our_outcomes, outcomes, strict=True)):
                for point in np.flatnonzero(one.broken != other.broken):
                    side = "ours" if one.broken[point] else "theirs"
                    disputed.append((attack, peer.name, seed, point, side))
    print("\n" + "\n".join(notes))
    with (folder / "disagreements.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("attack", "theirs", "seed", "point", "broken by"), *disputed])


def check_networks(logits_fn, net, x, y, flags) -> None:
    """Prints how far the two networks' logits differ; exits if they are not the same network."""
    batches = [slice(i, i + flags.batch_size) for i in range(0, len(x), flags.batch_size)]
    logits = np.concatenate([logits_fn(x[rows]) for rows in batches])
    theirs = np.concatenate([net(torch_models.to_torch(x[rows])).numpy() for rows in batches])
    gap = np.abs(logits - theirs).max()
    if not gap < 1e-3:
        raise SystemExit(f"error: the two networks' logits differ by {gap:g}")
    print(
        f"{flags.model}, {len(x)} test points, {flags.norm} eps {flags.eps:g}: "
        f"{100 * (logits.argmax(-1) == y).mean():.1f} % clean; logits of up to "
        f"{np.abs(logits).max():.1f} differ by {gap:.0e} at most"
    )


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Claims the folder for these settings; exits if it belongs to others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        raise SystemExit(f"error: {folder} holds a comparison with {old}; take another --out")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = partial(str.split, sep=",")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--workdir", help="of lenet5: a finished run")
    parser.add_argument("--weights", help="of preact_resnet18: an npz file, made if there is none")
    parser.add_argument("--train_steps", type=int, default=200, help="of preact_resnet18")
    parser.add_argument("--out", required=True, help="a folder for what is measured")
    parser.add_argument("--norm", choices=list(attacks.NORMS), default="linf")
    parser.add_argument("--eps", type=float, required=True, help="pixel units (pixels in [0,1])")
    parser.add_argument(
        "--points", type=int, default=1000, help="how many of the first test points"
    )
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, with seeds 0, 1, …")
    parser.add_argument("--attacks", type=names, default="apgd_ce,apgd_t,fab_t,square,standard")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["torchattacks"])
    parser.add_argument("--reference", help="a checkout of AutoAttack's own code")
    parser.add_argument("--num_steps", type=int, default=100, help="of APGD and FAB")
    parser.add_argument("--num_restarts", type=int, default=1, help="of APGD; AutoAttack in l1: 5")
    parser.add_argument("--num_targets", type=int, default=9, help="of APGD-T and FAB-T")
    parser.add_argument("--num_queries", type=int, default=5000, help="of Square")
    parser.add_argument("--num_pgd_steps", type=int, default=40)
    parser.add_argument("--num_cw_steps", type=int, default=1000, help="Carlini and Wagner's, each")
    parser.add_argument("--batch_size", type=int, default=250)
    return parser.parse_args()


def _is_nearest(attack: str) -> bool:
    return attack.startswith("nearest_")


def _over_seeds(values: np.ndarray, digits: int = 1) -> str:
    """The mean, and the standard deviation if there are several seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def _named(points: np.ndarray) -> str:
    more = f", … ({len(points)} in all)" if len(points) > _NUM_NAMED else ""
    return ", ".join(map(str, points[:_NUM_NAMED])) + more


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/robust_jax/compiled")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    main()

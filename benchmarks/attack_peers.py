"""Other people's attacks behind one signature, called with the same budgets as ours.

Each function below returns the attacks of one package by our names, as functions from
(x [B,C,H,W], y [B], seed) to x_adv. Names with `nearest_` ask for the nearest misclassified point,
the others for any within eps. What is not set here is the package's default. A package is imported
only when it is used, so the others may be missing.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

Attacks = dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]]

# Larger than any distance in the box, so that no point is too far to be accepted.
_FAR = 1e9


class Budget(NamedTuple):
    """What both sides are given; eps and step_size in pixel units."""

    norm: str
    eps: float
    num_steps: int
    num_restarts: int
    num_targets: int
    num_queries: int
    num_pgd_steps: int
    num_cw_steps: int
    batch_size: int
    num_classes: int

    @property
    def step_size(self) -> float:
        """PGD's step."""
        return 2.5 * self.eps / self.num_pgd_steps


def from_reference(net: torch.nn.Module, budget: Budget, folder: str) -> Attacks:
    """AutoAttack's own code (github.com/fra31/auto-attack), from the checkout in folder."""
    sys.path.insert(0, folder)
    import autoattack
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    norm = budget.norm.capitalize()
    common = {"norm": norm, "device": "cpu"}
    steps = {"n_iter": budget.num_steps, **common}
    climb = {"eps": budget.eps, "use_largereps": norm == "L1", **steps}

    def members(*names):
        def run(x, y, seed):
            ensemble = autoattack.AutoAttack(
                net,
                norm=norm,
                eps=budget.eps,
                seed=seed,
                verbose=False,
                version="custom",
                attacks_to_run=list(names),
                device="cpu",
            )
            ensemble.apgd = APGDAttack(net, n_restarts=budget.num_restarts, **climb)
            ensemble.apgd_targeted = APGDAttack_targeted(
                net, n_target_classes=budget.num_targets, **climb
            )
            ensemble.fab = FABAttack_PT(
                net, eps=budget.eps, n_target_classes=budget.num_targets, **steps
            )
            ensemble.square = SquareAttack(
                net, eps=budget.eps, n_queries=budget.num_queries, resc_schedule=False, **common
            )
            return ensemble.run_standard_evaluation(x, y, bs=len(x))

        return run

    def nearest_fab(x, y, seed):
        return FABAttack_PT(net, eps=_FAR, seed=seed, **steps).perturb(x, y)

    def nearest_fab_t(x, y, seed):
        # One target class at a time: perturb would leave a point alone once it is misclassified.
        attack = FABAttack_PT(net, eps=_FAR, seed=seed, **steps)
        best, distance = x, torch.full((len(x),), torch.inf)
        for attack.target_class in range(2, 2 + budget.num_targets):
            found = attack.attack_single_run(x, y, is_targeted=True)
            size = torch.linalg.vector_norm((found - x).flatten(1), _ORDERS[budget.norm], 1)
            nearer = (size > 0) & (size < distance)
            distance = torch.where(nearer, size, distance)
            best = torch.where(nearer.view(-1, 1, 1, 1), found, best)
        return best

    return {
        "apgd_ce": members("apgd-ce"),
        "apgd_dlr": members("apgd-dlr"),
        "apgd_t": members("apgd-t"),
        "fab": members("fab"),
        "fab_t": members("fab-t"),
        "square": members("square"),
        "standard": members("apgd-ce", "apgd-t", "fab-t", "square"),
        "nearest_fab": nearest_fab,
        "nearest_fab_t": nearest_fab_t,
    }


def from_torchattacks(net: torch.nn.Module, budget: Budget) -> Attacks:
    """torchattacks in linf and l2; `standard` is its members in turn, as its own takes 10 steps."""
    import torchattacks

    common = {"norm": budget.norm.capitalize(), "eps": budget.eps}
    steps = {"steps": budget.num_steps, **common}
    every = {"n_classes": budget.num_targets + 1, **steps}

    def make(seed):
        climb = {"n_restarts": budget.num_restarts, "seed": seed, **steps}
        attacks = {
            "apgd_ce": torchattacks.APGD(net, loss="ce", **climb),
            "apgd_dlr": torchattacks.APGD(net, loss="dlr", **climb),
            "apgd_t": torchattacks.APGDT(net, seed=seed, **every),
            "fab": torchattacks.FAB(net, seed=seed, **steps),
            "fab_t": torchattacks.FAB(net, multi_targeted=True, seed=seed, **every),
            "square": torchattacks.Square(
                net, n_queries=budget.num_queries, resc_schedule=False, seed=seed, **common
            ),
            "nearest_fab": torchattacks.FAB(net, seed=seed, **{**steps, "eps": _FAR}),
        }
        attacks["standard"] = torchattacks.MultiAttack(
            [attacks[name] for name in ("apgd_ce", "apgd_t", "fab_t", "square")]
        )
        pgd = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[budget.norm]
        attacks["pgd"] = pgd(
            net, eps=budget.eps, alpha=budget.step_size, steps=budget.num_pgd_steps
        )
        if budget.norm == "l2":
            attacks["nearest_deepfool"] = torchattacks.DeepFool(net)
            attacks["nearest_carlini_wagner"] = torchattacks.CW(net, steps=budget.num_cw_steps)
        return attacks

    def run(name):
        def call(x, y, seed):
            torch.manual_seed(seed)
            return make(seed)[name](x, y)

        return call

    return {name: run(name) for name in make(0)}


def from_foolbox(net: torch.nn.Module, budget: Budget) -> Attacks:
    """Foolbox in linf and l2; it has nothing of AutoAttack."""
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    pgd = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[budget.norm]
    deepfool = {"linf": foolbox.attacks.LinfDeepFoolAttack, "l2": foolbox.attacks.L2DeepFoolAttack}[
        budget.norm
    ]

    def run(attack, eps):
        def call(x, y, seed):
            torch.manual_seed(seed)
            return attack(model, x, y, epsilons=eps)[1]

        return call

    attacks = {
        "pgd": run(pgd(abs_stepsize=budget.step_size, steps=budget.num_pgd_steps), budget.eps),
        "nearest_deepfool": run(deepfool(), None),
    }
    if budget.norm == "l2":
        carlini_wagner = foolbox.attacks.L2CarliniWagnerAttack(steps=budget.num_cw_steps)
        attacks["nearest_carlini_wagner"] = run(carlini_wagner, None)
    return attacks


def from_art(net: torch.nn.Module, budget: Budget) -> Attacks:
    """The adversarial robustness toolbox; its Square halves the patches' share sooner."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    common = {
        "norm": _ORDERS[budget.norm],
        "eps": budget.eps,
        "batch_size": budget.batch_size,
        "verbose": False,
    }
    auto_pgd = {"eps_step": 2 * budget.eps, "max_iter": budget.num_steps, "nb_random_init": 1}

    def run(attack, **keywords):
        def call(x, y, seed):
            classifier = PyTorchClassifier(
                net,
                torch.nn.CrossEntropyLoss(),
                x.shape[1:],
                budget.num_classes,
                clip_values=(0, 1),
                device_type="cpu",
            )
            np.random.seed(seed)  # noqa: NPY002, it draws from the global state
            torch.manual_seed(seed)
            x_adv = attack(classifier, **keywords, **common).generate(x.numpy(), y.numpy())
            return torch.tensor(x_adv)

        return call

    return {
        "pgd": run(
            evasion.ProjectedGradientDescentPyTorch,
            eps_step=budget.step_size,
            max_iter=budget.num_pgd_steps,
            num_random_init=1,
        ),
        "apgd_ce": run(evasion.AutoProjectedGradientDescent, loss_type="cross_entropy", **auto_pgd),
        "apgd_dlr": run(
            evasion.AutoProjectedGradientDescent, loss_type="difference_logits_ratio", **auto_pgd
        ),
        "square": run(evasion.SquareAttack, max_iter=budget.num_queries),
    }


_ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}

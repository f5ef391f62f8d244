"""Calls of every public function of the library with few steps, for tests and benchmarks/."""

import functools
import inspect
from contextlib import contextmanager

import jax

import robust_jax
from robust_jax import attacks, energy, jacobian, margins

EPS = {"jsma": 2.0, "deepfool": 0.5, "carlini_wagner": 0.5}
FEW = {
    "pgd": {"num_steps": 2},
    "bim": {"num_steps": 2},
    "mim": {"num_steps": 2},
    "apgd": {"num_steps": 3},
    "apgd_targeted": {"num_steps": 3, "num_targets": 2},
    "fab": {"num_steps": 2, "num_targets": 2},
    "square": {"num_queries": 5},
    "carlini_wagner": {"num_steps": 3, "num_searches": 2},
    "deepfool": {"num_steps": 2},
    "multi_targeted": {"num_steps": 2, "num_targets": 2},
}
NEAREST = functools.partial(attacks.deepfool, num_steps=2)
# Attacks that run on the device; AutoAttack loops on the host.
ATTACKS = [name for name in attacks.ATTACKS if name != "autoattack"]


def attack(name):
    """The attack with few steps, as fn(logits_fn, x, y, key)."""
    usual = EPS.get(name, 0.1)

    def call(logits_fn, x, y, key, eps=usual):
        return attacks.ATTACKS[name](logits_fn, x, y, key, eps=eps, **FEW.get(name, {}))

    return call


FUNCTIONS = {
    **{name: attack(name) for name in ATTACKS},
    "transfer": lambda f, x, y, k, eps=0.1: attacks.transfer(
        f, x, y, k, surrogate=f, eps=eps, num_steps=2
    ),
    "is_adversarial": lambda f, x, y, k: attacks.is_adversarial(f, x, y),
    "jacobian": lambda f, x, y, k: jacobian.jacobian(f, x),
    "frobenius_norm": lambda f, x, y, k: jacobian.frobenius_norm(f, x, chunk_size=2),
    "singular_values": lambda f, x, y, k: jacobian.singular_values(f, x),
    "squared_frobenius_samples": lambda f, x, y, k: jacobian.squared_frobenius_samples(
        f, x, k, num_projections=4
    ),
    "frobenius_norm_estimate": lambda f, x, y, k: jacobian.frobenius_norm_estimate(
        f, x, k, num_projections=2
    ),
    "spectral_norm": lambda f, x, y, k: jacobian.spectral_norm(f, x, k, num_iterations=2),
    "relative_slope": lambda f, x, y, k: jacobian.relative_slope(f, x, y),
    "first_order": lambda f, x, y, k: margins.first_order(f, x, y),
    "boundary_distances": lambda f, x, y, k: margins.boundary_distances(f, x, y),
    "minimum_norm": lambda f, x, y, k: margins.minimum_norm(f, x, y, k, attack=NEAREST),
    "clever": lambda f, x, y, k: margins.clever(f, x, k, num_samples=2),
    "mean_square": lambda f, x, y, k, eps=0.1: energy.mean_square(f, x, y, k, eps=eps),
    "oscillation": lambda f, x, y, k, eps=0.1: energy.oscillation(f, x, y, k, eps=eps, num_steps=2),
    "rise": lambda f, x, y, k, eps=0.1: energy.rise(f, x, y, k, eps=eps, num_steps=2),
    "total_variation": lambda f, x, y, k, eps=0.1: energy.total_variation(f, x, y, k, eps=eps),
    "path": lambda f, x, y, k, eps=0.1: energy.path(f, x, y, k, eps=eps, num_steps=2),
}
WITH_EPS = [n for n, fn in FUNCTIONS.items() if "eps" in inspect.signature(fn).parameters]
WITHOUT_KEY = ["is_adversarial", "relative_slope", "first_order", "boundary_distances"]
KEYLESS_NORMS = ("jacobian", "frobenius_norm", "singular_values")
WITH_LABELS = [*WITH_EPS, *WITHOUT_KEY, "minimum_norm"]
AUTOATTACK = {
    "version": ("apgd_ce", "apgd_t", "fab_t", "square"),
    "overrides": {
        "apgd_ce": {"num_steps": 3},
        "apgd_t": {"num_steps": 3, "num_targets": 2},
        "fab_t": {"num_steps": 2, "num_targets": 2},
        "square": {"num_queries": 5},
    },
}


def autoattack(f, x, y, k, eps=0.05):
    return attacks.autoattack(f, x, y, k, eps=eps, progress=False, **AUTOATTACK)


def audit(f, x, y, k, eps=0.05):
    return robust_jax.audit(f, x, y, k, eps=eps, num_queries=5, progress=False)


def evaluate(f, x, y, k, eps=0.05):
    few = {"version": ("apgd_ce",), "overrides": {"apgd_ce": {"num_steps": 2}}, "num_audited": 0}
    return robust_jax.evaluate(f, x, y, k, eps=eps, progress=False, **few)


ALL = {**FUNCTIONS, "autoattack": autoattack, "audit": audit}


@contextmanager
def lowerings():
    """Yields a list of JAX's lowerings and compilations within the block."""
    seen = []

    def listen(event, duration, **_):
        if event.endswith(("/jaxpr_to_mlir_module_duration", "/backend_compile_duration")):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

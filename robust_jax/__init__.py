"""Adversarial robustness in JAX: attacks, losses, Jacobian norms, margins, energies, audit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_jax import attacks, energy, errors, jacobian, losses, margins
    from robust_jax._audit import Audit, Check, audit
    from robust_jax._network import plain_convolutions
    from robust_jax.app.evaluation import Evaluation, evaluate
    from robust_jax.attacks import norms

__version__ = "0.2.0"

__all__ = [
    "Audit",
    "Check",
    "Evaluation",
    "attacks",
    "audit",
    "energy",
    "errors",
    "evaluate",
    "jacobian",
    "losses",
    "margins",
    "norms",
    "plain_convolutions",
]

# Where the public names live that are not modules of this package. They are imported on first use,
# so that reading a run's folder does not wait for JAX.
_HOMES = {
    "Audit": "robust_jax._audit",
    "Check": "robust_jax._audit",
    "audit": "robust_jax._audit",
    "evaluate": "robust_jax.app.evaluation",
    "Evaluation": "robust_jax.app.evaluation",
    "norms": "robust_jax.attacks",
    "plain_convolutions": "robust_jax._network",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"robust_jax.{name} needs {error.name}, of the extra train: pip install -e '.[train]'"
        ) from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

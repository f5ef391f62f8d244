"""The threat model of a config, which everything that takes a norm and a radius follows.

An adversary, an attack, a regulariser, a measurement or the audit may have its own. A radius
is a number in pixel units or a fraction, as in "8/255"; an attack's relative_step_size is its step
in units of its radius.
"""

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from robust_jax._audit import audit
from robust_jax.app.config import choose, keyword_parameters
from robust_jax.app.measurements import MEASUREMENTS
from robust_jax.attacks import ATTACKS
from robust_jax.attacks.norms import NORMS, Norm
from robust_jax.errors import UserError
from robust_jax.train.regularizers import REGULARIZERS


def radius(value: Any, path: str) -> Any:
    """A radius as a number, several as a tuple. Raises UserError for other strings."""
    if isinstance(value, list | tuple):
        return tuple(radius(one, path) for one in value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.eE+]+)\s*)?", value)
        try:
            number, divisor = match.groups() if match else ("", "")
            return float(number) / float(divisor or 1)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f'{path} is {value!r}; a radius is a number or a fraction, as in "8/255"'
            ) from None
    return value


def radii(eps: float | tuple[float, ...]) -> tuple[float, ...]:
    """An attack's radii as a tuple; an entry may give one or several."""
    return eps if isinstance(eps, tuple) else (eps,)


def complete(config: ConfigDict) -> ConfigDict:
    """The config with a norm and a radius for everything: its own or the threat model's."""
    norm = choose(NORMS, config.threat.norm, "config.threat.norm")
    eps = radius(config.threat.eps, "config.threat.eps")
    result = ConfigDict(config)
    result.threat = ConfigDict({"norm": norm, "eps": eps})
    result.audit = _followed(config.audit, "audit", {"audit": audit}, norm, eps, "config.audit")
    for field in ("adversary", "validation_attack"):
        result[field] = _followed(config[field], field, ATTACKS, norm, eps, f"config.{field}")
    for table, choices in (
        ("attacks", ATTACKS),
        ("regularizers", REGULARIZERS),
        ("measurements", MEASUREMENTS),
    ):
        result[table] = ConfigDict(
            {
                label: _followed(entry, label, choices, norm, eps, f"config.{table}.{label}")
                for label, entry in config[table].items()
            }
        )
    return result


def _followed(
    entry: Any, label: str, choices: Mapping[str, Callable], norm: str, eps: float, path: str
) -> Any:
    """The entry with a norm and an eps if its function takes them; unchanged if it is invalid."""
    name = entry.get("name", label) if isinstance(entry, ConfigDict) else None
    fn = choices.get(name) if isinstance(name, str) else None
    if fn is None:
        return entry
    result, parameters = dict(entry), keyword_parameters(fn)
    if "eps" in result:
        result["eps"] = radius(result["eps"], f"{path}.eps")
    # A measurement that takes no radius, such as margins, has a norm of its own.
    needed = {"norm"} if choices is REGULARIZERS else {"norm", "eps"}
    if not needed <= set(parameters):
        return ConfigDict(result)
    if "norm" not in result and _accepts(parameters["norm"], norm):
        result["norm"] = norm
    if "eps" in parameters and "eps" not in result:
        own = result.get("norm", inspect.signature(fn).parameters["norm"].default)
        if own != norm and own in NORMS:
            raise UserError(
                f"{path}.eps is missing: its norm is {own}, and config.threat's radius in {norm}"
            )
        if own == norm:
            result["eps"] = eps
    return ConfigDict(result)


def _accepts(annotation: Any, norm: str) -> bool:
    if annotation == Norm:
        return True
    kinds = (annotation, *typing.get_args(annotation))  # Literal["l2"], or that beside a record
    return any(typing.get_origin(k) is Literal and norm in typing.get_args(k) for k in kinds)

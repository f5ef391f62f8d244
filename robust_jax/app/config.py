"""Reads a config; refuses unknown fields, names, keywords and durations before compilation.

A config is an ml_collections.ConfigDict with the fields of configs/default.py. An entry
{"name": …, **keywords} names a function or class in a table and the keywords it is called with.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import typeguard
from ml_collections import ConfigDict

from robust_jax.errors import UserError

Name = TypeVar("Name", bound=str)

# Tables that a config fills freely: any key, each value an entry that is checked where it is used.
TABLES = ("regularizers", "attacks", "measurements")
# With more choices than this, only the one that was probably meant is named.
_MANY = 30


def check_fields(config: ConfigDict, schema: ConfigDict) -> None:
    """Compares a config with the one that holds every field (configs/default.py).

    Raises UserError for a field that is unknown, missing or of another type than the default.
    """
    _check_section(config, schema, "config")


# Fields that a section may leave out; the audit then follows config.threat.
_MAY_BE_MISSING = {"config.audit": ("norm", "eps")}


def _check_section(config: ConfigDict, schema: ConfigDict, path: str) -> None:
    for field in config:
        if field not in schema and field not in _MAY_BE_MISSING.get(path, ()):
            raise UserError(f"{path}.{field} is not a field of a config; {_choices(field, schema)}")
    for field in schema:
        here, default = f"{path}.{field}", schema[field]
        if field not in config:
            raise UserError(f"{here} is missing; the default is {_short(default)}")
        value = config[field]
        if field in TABLES:
            if not isinstance(value, ConfigDict):
                raise UserError(f"{here} must be a table of entries, not {value!r}")
        elif isinstance(default, ConfigDict) and "name" not in default:
            if not isinstance(value, ConfigDict):
                raise UserError(f"{here} must be a section like {_short(default)}, not {value!r}")
            _check_section(value, default, here)
        elif field == "eps" and isinstance(value, str):
            pass  # a fraction, as in "8/255"
        elif isinstance(default, bool | int | float | str):
            expected = float if isinstance(default, float) else type(default)
            check_type(value, expected, here)


def bind(
    choices: Mapping[str, Callable],
    entry: Any,
    path: str,
    *,
    reserved: Iterable[str] = (),
    named: Mapping[str, Mapping[str, Any]] | None = None,
) -> partial:
    """The function an entry names, with its keywords bound; `reserved` ones are refused.

    A keyword in `named` is itself a name, looked up in the table given for it. Raises UserError,
    naming the field, the value and the choices, for an unknown name, an unknown or missing keyword,
    or a keyword of the wrong type.
    """
    if not isinstance(entry, Mapping | ConfigDict) or "name" not in entry:
        raise UserError(
            f'{path} must be an entry like {{"name": …}}, not {_short(entry)}; '
            f"names: {', '.join(choices)}"
        )
    from robust_jax.attacks.norms import NORMS, Norm  # imports JAX, which reports need not wait for

    name = choose(choices, entry["name"], f"{path}.name")
    keywords = {key: _plain(value) for key, value in entry.items() if key != "name"}
    parameters = keyword_parameters(choices[name], reserved)
    for key, value in keywords.items():
        if key not in parameters:
            raise UserError(f"{path}.{key} is not a keyword of {name}; {_choices(key, parameters)}")
        if parameters[key] == Norm:
            keywords[key] = choose(NORMS, value, f"{path}.{key}")
        elif table := (named or {}).get(key):
            keywords[key] = table[choose(table, value, f"{path}.{key}")]
        else:
            keywords[key] = check_type(value, parameters[key], f"{path}.{key}")
    required = [
        p.name
        for p in inspect.signature(choices[name]).parameters.values()
        if p.name in parameters and p.default is inspect.Parameter.empty
    ]
    for key in required:
        if key not in keywords:
            raise UserError(f"{path}.{key} is missing: {name} needs it")
    return partial(choices[name], **keywords)


def keyword_parameters(fn: Callable, reserved: Iterable[str] = ()) -> dict[str, Any]:
    """The keyword-only parameters of a function, or the fields of a flax module, with types."""
    return dict(_keyword_parameters(fn, frozenset(reserved)))


@functools.cache
def _keyword_parameters(fn: Callable, reserved: frozenset[str]) -> dict[str, Any]:
    is_class = inspect.isclass(fn)
    hints = typing.get_type_hints(fn)
    hidden = {*reserved, "parent", "name"} if is_class else {*reserved}
    return {
        p.name: hints.get(p.name, Any)
        for p in inspect.signature(fn).parameters.values()
        if (is_class or p.kind == p.KEYWORD_ONLY) and p.name not in hidden
    }


def choose(choices: Iterable[Name], name: Any, path: str) -> Name:
    """Returns the name if it is one of the choices; else raises UserError with the choices."""
    if name not in list(choices):
        raise UserError(f"{path} is {name!r}; {_choices(name, choices)}")
    return name


def check_type(value: Any, expected: Any, path: str) -> Any:
    """Returns the value (a list as a tuple) if it has the expected type; else raises UserError."""
    if isinstance(value, list):
        value = tuple(value)
    try:
        if isinstance(value, bool) and expected in (int, float):
            raise typeguard.TypeCheckError("a flag is not a number")
        return typeguard.check_type(
            value,
            expected,
            collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        )
    except typeguard.TypeCheckError:
        raise UserError(f"{path} must be {_describe(expected)}, not {value!r}") from None


def guard(path: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls fn(*args, **kwargs); turns its errors into a UserError that names the config field."""
    try:
        return fn(*args, **kwargs)
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def num_steps(duration: str, path: str, *, batch_size: int, num_examples: int) -> int:
    """A duration such as "20 epochs", "500 steps" or "1e6 examples" in steps, rounded up.

    Raises UserError if it is not one positive number with one unit.
    """
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(step|epoch|example)s?\s*", str(duration))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not (number > 0 and math.isfinite(number)):
        raise UserError(
            f"{path} is {duration!r}; give one positive number with one unit: "
            '"500 steps", "20 epochs" or "1e6 examples"'
        )
    examples_per_unit = {"step": batch_size, "epoch": num_examples, "example": 1}[match[2]]
    # The small slack keeps float error, as in 0.1 · 30, from adding a step.
    return max(1, math.ceil(number * examples_per_unit / batch_size - 1e-9))


def differences(one: Mapping, other: Mapping, *, ignore: Iterable[str] = ()) -> list[str]:
    """The fields in which two configs differ, each as "field: old → new".

    ignore: dotted paths of fields and sections.
    """
    ours, theirs, ignore = flatten(one), flatten(other), tuple(ignore)
    return [
        f"config.{field}: {ours.get(field)!r} → {theirs.get(field)!r}"
        for field in sorted({*ours, *theirs})
        if ours.get(field, _MISSING) != theirs.get(field, _MISSING) and not is_within(field, ignore)
    ]


def is_within(field: str, paths: Iterable[str]) -> bool:
    """Whether a dotted field is one of the paths, or lies within one."""
    return any(f"{field}.".startswith(f"{path}.") for path in paths)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: plain dicts, lists for tuples."""
    return json.loads(config.to_json_best_effort())


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_MISSING = object()


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def _choices(name: Any, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    if close and len(choices) > _MANY:
        return f"did you mean {close[0]}?"
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}choices: {', '.join(choices) or 'none'}"


def _describe(expected: Any) -> str:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        # A config cannot hold a record or an array.
        held = [a for a in args if not (dataclasses.is_dataclass(a) or hasattr(a, "array_type"))]
        return " or ".join(map(_describe, held))
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "True or False",
        type(None): "None",
    }
    return names.get(expected, str(expected).replace("typing.", ""))


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) < 60 else text[:57] + "…"


def get_field(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    for field in path.split("."):
        config = config.get(field) if isinstance(config, ConfigDict) else None
    return config


def set_field(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the value at a dotted path, and creates the sections on the way."""
    *sections, field = path.split(".")
    for section in sections:
        if not isinstance(config.get(section), ConfigDict):
            config[section] = ConfigDict()
        config = config[section]
    with config.ignore_type():
        config[field] = value

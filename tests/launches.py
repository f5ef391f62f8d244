"""Runs of configs/default.py with other fields: as flags of launch.py, or as a config."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default
from robust_jax.app import config as config_lib


def flags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags of launch.py that set these fields, by dotted path."""
    typed = (f"--config.{path}={value}" for path, value in fields.items())
    return ("--config=configs/default.py", *typed)


def default_with(fields: Mapping[str, Any]) -> ConfigDict:
    """The default config with these values at these dotted paths."""
    config = default.get_config()
    for path, value in fields.items():
        value = ConfigDict(value) if isinstance(value, Mapping) else value
        config_lib.set_field(config, path, value)
    return config

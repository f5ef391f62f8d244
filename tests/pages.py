"""The Python examples of README and docs/."""

import importlib
import os
import re

from tests.conftest import REPOSITORY

# Frameworks that pages show but the extras train and test do not install.
_OPTIONAL = ("haiku", "keras", "torch", "torchax")
os.environ.setdefault("KERAS_BACKEND", "jax")


def code(path: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text(), re.DOTALL)


def missing(block: str) -> str | None:
    """An optional framework that the example imports and that cannot be imported here."""
    for name in re.findall(r"^import (\w+)", block, re.MULTILINE):
        if name in _OPTIONAL:
            try:
                importlib.import_module(name)
            except (ImportError, AttributeError):  # torchax, where PyTorch is too new for it
                return name
    return None

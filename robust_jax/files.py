"""Atomic writes, so that a killed process leaves no partial file; errors of unreadable npz."""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# What numpy.load raises, without unpickling, for a file that is damaged or not an npz file.
# NotImplementedError and RuntimeError come from zipfile, for an unknown compression or flag.
UNREADABLE_NPZ = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_atomically(path: Path, text: str) -> Path:
    """Writes text beside path and renames it to path, which is returned."""
    pending = _pending(path)
    pending.write_text(text, encoding="utf-8")
    return pending.replace(path)


def write_json(path: Path, value: Any) -> Path:
    """Writes a value as JSON beside path and renames it to path, which is returned."""
    return write_atomically(path, json.dumps(value, indent=2) + "\n")


def save_arrays(path: Path, **arrays: np.ndarray | str | int) -> Path:
    """Writes a compressed npz file beside path and renames it to path, which is returned."""
    pending = _pending(path)
    with pending.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return pending.replace(path)


def _pending(path: Path) -> Path:
    """A name for this process alone, as others may write the same file in a shared folder."""
    return path.with_name(f"{path.name}.{os.getpid()}.pending")

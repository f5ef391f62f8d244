"""Files that are whole or not there, whenever the process may be killed; and unreadable ones."""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# What numpy.load raises, without unpickling, of an npz file that is damaged or something else;
# NotImplementedError and RuntimeError are zipfile's, of a compression or a flag it does not know.
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
    """A name for this process alone; others may write the same file of a shared folder."""
    return path.with_name(f"{path.name}.{os.getpid()}.pending")

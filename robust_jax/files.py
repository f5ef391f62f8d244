"""Files that are whole or not there, whenever the process may be killed."""

from pathlib import Path


def write_atomically(path: Path, text: str) -> Path:
    """Writes text beside path and renames it to path, which is returned."""
    pending = path.with_name(path.name + ".pending")
    pending.write_text(text, encoding="utf-8")
    return pending.replace(path)

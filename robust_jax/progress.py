"""Progress on the terminal."""

import sys

from tqdm import tqdm

from robust_jax.devices import processes


def progress_bar(
    total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True
) -> tqdm:
    """A bar with the estimated time left, in the first process only; a log gets few lines of it."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not (shown and processes.is_first()),
        smoothing=0,  # steps are dispatched in bursts: only the average says what is left
    )

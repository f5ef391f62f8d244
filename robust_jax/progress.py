"""Progress on the terminal."""

import sys

from tqdm import tqdm


def progress(
    total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True
) -> tqdm:
    """A bar with an estimate of what is left; in a log file a line every half minute."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not shown,
        smoothing=0,  # steps are dispatched in bursts: only the average says what is left
    )

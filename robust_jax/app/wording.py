"""Numbers and names as the pages, the tables and the cards write them."""

from math import isclose

from robust_jax import plots
from robust_jax.analysis.summaries import wilson_interval


def format_eps(eps: float) -> str:
    """Writes 0.1 as 0.1, and 0.0313725… as 8/255, even if rounded to six digits."""
    levels = round(eps * 255)
    is_fraction = levels and isclose(eps * 255, levels, rel_tol=5e-6) and len(f"{eps:g}") > 5
    return f"{levels}/255" if is_fraction else f"{eps:g}"


def threat_in_words(norm: str, eps: float, between: str = "") -> str:
    """Writes ℓ∞ ε = 0.1, or puts words between the two."""
    return f"{plots.norm_symbol(norm)} {between}ε = {format_eps(eps)}"


def percent(share: float) -> str:
    """Writes 0.634 as 63.4."""
    return f"{100 * share:.1f}"


def with_interval(share: float, count: int) -> str:
    """A share of count examples in percent, with its 95 % Wilson interval."""
    low, high = wilson_interval(share, count)
    return f"{percent(share)} % (95 % interval {percent(low)} to {percent(high)} %)"


# Names of attacks, models, losses and regularisers that people write in capitals.
_ABBREVIATIONS = (
    "apgd",
    "bim",
    "cnn",
    "dlr",
    "fab",
    "fgsm",
    "jsma",
    "kl",
    "mim",
    "mlp",
    "pgd",
    "vat",
)


def words(name: str) -> str:
    """Writes guided_complement_entropy as words, and pgd as PGD."""
    if name in _ABBREVIATIONS:
        return name.upper()
    return name.replace("_", " ").replace("cross entropy", "cross-entropy")


def number(x: float | None) -> str:
    """Writes three digits, whole numbers in full, and a dash for a missing number."""
    if x is None:
        return "–"
    return f"{x:,}" if isinstance(x, int) else f"{x:.3g}"

"""The library's docstrings: every public function has its sections, and their examples run."""

import doctest
import importlib
import inspect
import re

import pytest

import robust_jax

MODULES = (
    "attacks", "attacks.norms", "energy", "jacobian", "losses", "margins", "plots",
    *(f"analysis.{name}" for name in ("calibration", "features", "latent", "spectra", "summaries",
                                      "surface")),
)  # fmt: skip
NUMBER = r"-?\d+\.\d*(?:e[-+]?\d+)?"


class ToThePrecisionWritten(doctest.OutputChecker):
    """Compares numbers to the digits that the docstring shows, and ignores spaces."""

    def check_output(self, want, got, optionflags):
        want, got = (re.sub(r"\s", "", text) for text in (want, got))
        if re.sub(NUMBER, "#", want) != re.sub(NUMBER, "#", got):
            return False
        shown, found = (re.findall(NUMBER, text) for text in (want, got))
        return all(
            abs(float(a) - float(b)) <= 10.0 ** -len(a.partition(".")[2])
            for a, b in zip(shown, found, strict=True)
        )


def functions():
    for name in MODULES:
        module = importlib.import_module(f"robust_jax.{name}")
        for label in module.__all__:
            value = getattr(module, label)
            if inspect.isfunction(value):
                yield pytest.param(value, id=f"{name}.{label}")
            # A package re-exports its modules' classes, which are checked once.
            elif inspect.isclass(value) and value.__module__ == module.__name__:
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield pytest.param(function, id=f"{name}.{label}.{method}")
    for label in ("audit", "evaluate", "plain_convolutions"):
        yield pytest.param(getattr(robust_jax, label), id=label)


@pytest.mark.parametrize("function", list(functions()))
def test_example_runs_and_every_argument_is_described(function):
    check_docstring(function)


def check_docstring(function):
    doc = inspect.getdoc(function)
    is_checked = getattr(function, "is_compiled", False)  # its arguments are checked
    for section in ("Args", "Returns", "Example", *(["Raises"] if is_checked else [])):
        assert f"\n{section}:\n" in doc, section
    described = re.search(r"\nArgs:\n(.*?)\n\n", doc, re.DOTALL)[1]
    for parameter in inspect.signature(function).parameters.keys() - {"self"}:
        assert re.search(rf"^    (\w+, )*{parameter}\b.*:", described, re.MULTILINE), parameter
    (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__qualname__, globs={})
    runner = doctest.DocTestRunner(ToThePrecisionWritten(), verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append, clear_globs=True)
    assert runner.tries > 0 and runner.failures == 0, "".join(report)

"""Eight fake devices for every test, and a compilation cache that the workers share."""

import contextlib
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

import tests.typechecker  # noqa: F401 - jaxtyping's hook finds it as an attribute of the package

# Networks are small, so the suite spends its time compiling; these flags halve it.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# Eight devices and two workers already have enough threads for two cores.
COMPILED_QUICKLY += " --xla_cpu_multi_thread_eigen=false"
if jax.__version_info__ < (0, 11):  # newer versions do not know the flag
    COMPILED_QUICKLY += " --xla_cpu_use_fusion_emitters=false"
# JAX reads this when the first array is made, which is later.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {COMPILED_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
)

REPOSITORY = Path(__file__).parents[1]
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "robust_jax_test_cache")
)
# The many subprocesses share their bytecode, even if the environment forbids writing it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", f"{CACHE}_bytecode")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # scikit-learn's threads would wait for each other
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Garbage collection and the source lines in programs would take a tenth of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)


# No deadline, as machines may be busy; derandomised, so that failures are reproducible.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Runs the longest files early, so that no worker is left alone with them at the end.

    Files that count or free everything their process holds come before those.
    """
    first = ["test_study.py", "test_front.py"]
    first += ["test_demo.py", "test_study_runs.py", "test_processes.py", "test_functions.py"]
    ranks = {name: rank for rank, name in enumerate(first)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(first)))


@contextlib.contextmanager
def strictly():
    """Makes JAX refuse everything that it can be told to refuse."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_key_reuse(True),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped_in_time():
    """Drops programs before their memory maps reach Linux's limit of 65,530 a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
        jax.clear_caches()
        gc.collect()


def slow_but(chosen, names):
    """The names as parameters; all but the chosen ones are left to `make test-slow`."""
    return [pytest.param(n, marks=[] if n in chosen else pytest.mark.slow) for n in names]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def untyped(monkeypatch):
    """Leaves annotations unenforced, as for a user, so that the code's own errors are tested."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@contextlib.contextmanager
def pages_undrawn():
    """Gives pages empty figures, for tests that do not read them: drawing takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_jax.app.pages.html._source", lambda *_: "data:image/svg+xml;base64,")
        yield


@pytest.fixture
def undrawn():
    with pages_undrawn():
        yield


def environment_of(devices: int, *, as_users_do: bool = False) -> dict[str, str]:
    """The environment of a subprocess with this many fake devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if not as_users_do:
        flags += f" {COMPILED_QUICKLY}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def launch():
    """launch(*flags, devices=1) runs launch.py in a subprocess.

    as_users_do: compiles as for a user, for the demo and runs compared with it.
    """

    def run(
        *flags: str, devices: int = 1, as_users_do: bool = False, timeout: float = 400
    ) -> subprocess.CompletedProcess:
        environment = environment_of(devices, as_users_do=as_users_do)
        return subprocess.run(
            [sys.executable, "launch.py", *flags],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run

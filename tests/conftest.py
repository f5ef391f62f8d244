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

# Small networks: the suite spends its time compiling, half of it with these.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# Eight devices and two workers on two cores have threads enough.
COMPILED_QUICKLY += " --xla_cpu_multi_thread_eigen=false"
if jax.__version_info__ < (0, 11):  # which does not know it any more
    COMPILED_QUICKLY += " --xla_cpu_use_fusion_emitters=false"
# Read when the first array is made, which is later.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {COMPILED_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
)

REPOSITORY = Path(__file__).parents[1]
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "robust_jax_test_cache")
)
# The many processes that are started share their bytecode, also where none is to be written.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", f"{CACHE}_bytecode")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # scikit-learn's threads would wait for each other
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# A tenth of the time goes to garbage and to the lines of source that a program came from.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)


# A machine may be busy, and what fails once has to fail again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """The longest files go early, or one worker would be alone with them in the end.

    Before them go those that count, or free, all that their process holds.
    """
    first = ["test_study.py", "test_front.py"]
    first += ["test_demo.py", "test_study_runs.py", "test_processes.py", "test_functions.py"]
    ranks = {name: rank for rank, name in enumerate(first)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(first)))


@contextlib.contextmanager
def strictly():
    """Everything that JAX can be told to refuse."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_key_reuse(True),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped_in_time():
    """Programs take some memory maps each, of which Linux gives a process 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
        jax.clear_caches()
        gc.collect()


def slow_but(chosen, names):
    """The names as parameters, of which all but the chosen ones are left to `make test-slow`."""
    return [pytest.param(n, marks=[] if n in chosen else pytest.mark.slow) for n in names]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def untyped(monkeypatch):
    """Annotations are not enforced, as for a user: what the code itself says is tested."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@contextlib.contextmanager
def pages_undrawn():
    """Pages get empty figures, for tests that do not read them: drawing takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_jax.app.pages.html._source", lambda *_: "data:image/svg+xml;base64,")
        yield


@pytest.fixture
def undrawn():
    with pages_undrawn():
        yield


def environment_of(devices: int, *, as_users_do: bool = False) -> dict[str, str]:
    """For a process of its own, with as many made-up devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if not as_users_do:
        flags += f" {COMPILED_QUICKLY}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def launch():
    """launch(*flags, devices=1) runs launch.py in a process of its own.

    as_users_do: compiled as for a user, for the demo and what is compared with it.
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

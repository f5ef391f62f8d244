"""The networks that the authors of arXiv 1907.11780 trained; skipped without them or MNIST.

They lie in the folder that ROBUST_JAX_REFERENCE names, ../shared/reference by default, and are not
part of the repository.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import authors_networks
from robust_jax import Audit, attacks, audit, losses, margins
from robust_jax.errors import UserError
from tests.conftest import REPOSITORY

REFERENCE = Path(os.environ.get("ROBUST_JAX_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
NETWORKS = authors_networks.NETWORKS


@pytest.fixture(scope="module")
def mnist():
    try:
        return authors_networks.mnist(10_000)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def networks():
    if not REFERENCE.is_dir():
        pytest.skip("the authors' networks are missing")
    return {name: authors_networks.load(REFERENCE / f"{name}.npz") for name in NETWORKS}


def test_the_published_steps_shrink_with_the_gradient():
    """So PGD stays at its start where the logits saturate float32."""
    weights = jax.random.normal(jax.random.key(0), (12, 3))
    x = jnp.full((4, 12), 0.5).at[:, 0].set(jnp.linspace(0.2, 0.8, 4))
    keys = jax.random.split(jax.random.key(1), 4)

    def moved(scale, steps):
        def logits_fn(x):
            return scale * (x @ weights)

        y = logits_fn(x).argmax(-1)
        run = functools.partial(authors_networks.published_pgd, logits_fn, x, y, keys, eps=0.1)
        start, end = (run(num_steps=n, step_size=0.02) for n in (0, steps))
        assert attacks.distances(x, end, norm="l2").max() <= 0.1 + 1e-6
        return float(attacks.distances(start, end, norm="l2").min())

    assert moved(1.0, 10) > 0.05
    assert moved(1e4, 10) < 1e-3


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "cnn" in n else []) for n in NETWORKS],
)
def test_clean_accuracy_is_what_the_authors_report(name, networks, mnist):
    assert 100 * authors_networks.accuracy(networks[name], *mnist) == pytest.approx(NETWORKS[name])


@pytest.mark.slow
def test_the_audit_warns_of_the_regularised_network(networks, mnist):
    """Its logits saturate float32's softmax, where PGD on cross-entropy stands still."""
    x, y = (a[:20] for a in mnist)
    found = audit(
        networks["mnist_cnn_regularized"],
        x,
        y,
        jax.random.key(0),
        eps=2.0,
        norm="l2",
        training_loss=losses.cross_entropy,
        num_queries=50,
        progress=False,
    )
    assert found.verdict in ("warn", "fail")
    flagged = {check.name for check in found.checks if check.verdict in ("warn", "fail")}
    assert flagged >= {"gradients", "losses"}


@pytest.mark.parametrize("is_audited", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_finds_of_the_linear_network_what_its_margins_say(
    is_audited, networks, mnist, monkeypatch
):
    """The margins are exact but for the box, which can only help the network."""
    x, y = (a[:40] for a in mnist)
    network = networks["mnist_linear_plain"]
    if not is_audited:  # compiling the audit takes most of the time

        def passed(logits_fn, x, y, key, *, eps, norm, training_loss):
            assert logits_fn is network and training_loss is losses.cross_entropy
            return Audit("pass", (), norm, eps, len(x))

        monkeypatch.setattr(authors_networks, "audit", passed)
    found = authors_networks.evaluate(
        network,
        x,
        y,
        eps=0.5,
        num_steps=20,
        step_size=0.1,
        num_audited=5,
        num_for_pgd=20,
        version=("apgd_ce",),
        overrides={"apgd_ce": {"num_steps": 20}},
        progress=False,
    )
    head = network.variables["params"]["head"]
    exact = margins.linear(np.asarray(head["kernel"]).T, np.asarray(head["bias"]), x, y, norm="l2")
    assert (exact > 0.5).mean() <= found["autoattack"] < found["clean"]
    holds = (exact > 0.5)[:20].mean()
    assert (found["count"], found["count_pgd"]) == (40, 20)
    assert holds <= found["autoattack_where_pgd"] and holds <= found["pgd_margin"] <= holds + 0.1
    assert found["clean"] == (exact > 0).mean() and found["audit"]["verdict"] in ("pass", "warn")
    audited = [found["audit"][name] for name in ("norm", "eps", "num_examples")]
    assert audited[:2] == ["l2", 0.5] and audited[2] <= 5

"""The networks that the authors of arXiv 1907.11780 trained; skipped without them or MNIST.

They lie in the folder that ROBUST_JAX_REFERENCE names, ../shared/reference by default, and are not
part of the repository.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import authors_networks
from robust_jax import audit, losses
from robust_jax.errors import UserError
from tests.conftest import REPOSITORY

REFERENCE = Path(os.environ.get("ROBUST_JAX_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the authors' networks are missing")


@pytest.fixture(scope="module")
def mnist():
    try:
        return authors_networks.mnist(10_000)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def networks():
    return {name: authors_networks.load(REFERENCE / f"{name}.npz") for name in NETWORKS}


NETWORKS = authors_networks.NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_clean_accuracy_is_what_the_authors_report(name, networks, mnist):
    assert 100 * authors_networks.accuracy(networks[name], *mnist) == pytest.approx(NETWORKS[name])


def test_the_audit_warns_of_the_regularised_network(networks, mnist):
    """Its logits saturate float32's softmax, where PGD on cross-entropy stands still."""
    x, y = (a[:50] for a in mnist)
    found = audit(
        networks["mnist_cnn_regularized"],
        x,
        y,
        jax.random.key(0),
        eps=2.0,
        norm="l2",
        training_loss=losses.cross_entropy,
        num_queries=100,
    )
    assert found.verdict in ("warn", "fail")
    flagged = {check.name for check in found.checks if check.verdict in ("warn", "fail")}
    assert flagged & {"gradients", "losses", "precision"}


def test_the_margin_finds_what_cross_entropy_does_not(networks, mnist):
    x, y = (a[:50] for a in mnist)
    found = authors_networks.evaluate(
        networks["mnist_cnn_regularized"],
        x,
        y,
        eps=2.0,
        num_steps=50,
        num_audited=10,
        version=("apgd_t",),
        overrides={"apgd_t": {"num_steps": 10, "num_targets": 2}},
        progress=False,
    )
    assert found["clean"] > 0.95
    assert found["pgd_margin"] < found["pgd_cross_entropy"] - 0.2
    assert found["autoattack"] < found["pgd_cross_entropy"] - 0.2
    assert np.isfinite(found["seconds"])

"""Attacks on a surrogate: the one a config names, or one that is trained for the run."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax import attacks
from robust_jax.app import subject, surrogate
from robust_jax.app.experiment import build
from robust_jax.errors import UserError
from tests.digits import EPS, test_points, trained
from tests.linear import make_nonlinear

KEY = jax.random.key(0)


def test_an_attack_is_transferred_from_the_cnn_that_its_run_trains(tmp_path, monkeypatch):
    asked = []

    def undefended(experiment, workdir):
        asked.append(workdir)
        return trained()

    monkeypatch.setattr(surrogate, "_undefended", undefended)
    config = default.get_config()
    few = {"name": "pgd", "eps": (EPS,), "num_steps": 2}
    config.attacks = ConfigDict({"pgd": few})
    alone = build(config)
    assert surrogate.bound(alone, tmp_path) is alone and not asked

    config.attacks = ConfigDict({"pgd": few, "transferred": {**few, "surrogate": "train"}})
    experiment = surrogate.bound(build(config), tmp_path)
    assert asked == [tmp_path]
    assert experiment.evaluator._grids is experiment.grids
    x, _ = test_points(40)
    network = make_nonlinear(KEY, (8, 8, 1), 10)
    y = np.asarray(network(x)).argmax(-1)
    keys = jax.random.split(KEY, len(x))
    found = {
        name: np.asarray(grid.attack(network, x, y, keys, eps=EPS))
        for name, grid in experiment.grids.items()
    }
    expected = attacks.transfer(
        network, x, y, keys, surrogate=trained(), eps=EPS, num_steps=2, attack=attacks.pgd
    )
    np.testing.assert_allclose(found["transferred"], expected, atol=1e-6)
    assert np.abs(found["transferred"] - found["pgd"]).max() > EPS


@pytest.mark.parametrize(("shape", "num_classes"), [((5, 5, 1), 10), ((8, 8, 1), 3)])
@pytest.mark.parametrize("field", ["attacks.transferred.surrogate", "audit.surrogate"])
def test_a_surrogate_of_another_task_is_refused(field, shape, num_classes, tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    other = SimpleNamespace(image_shape=shape, num_classes=num_classes)
    monkeypatch.setattr(
        subject, "load", lambda _: SimpleNamespace(dataset=other, logits_fn=trained())
    )
    config = default.get_config()
    config.attacks = ConfigDict()
    if field == "audit.surrogate":
        config.audit.surrogate = str(tmp_path)
    else:
        config.attacks.transferred = {"name": "fgsm", "surrogate": str(tmp_path)}
    with pytest.raises(UserError, match=f"config.{field}: {tmp_path} has images of .* on the same"):
        build(config)

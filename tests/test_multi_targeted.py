"""MultiTargeted: the runs of PGD it is made of, and what they find together."""

import jax
import jax.numpy as jnp
import numpy as np

from robust_jax import losses
from robust_jax.attacks import multi_targeted, pgd
from robust_jax.attacks._best import likeliest_wrong
from robust_jax.keys import example_keys, fold_each
from tests.linear import interior_images, make_linear, make_nonlinear

KEY = jax.random.key(0)


def test_is_the_best_of_one_run_of_pgd_for_each_wrong_class():
    logits_fn = make_nonlinear(KEY, num_classes=5)
    x = np.asarray(jax.random.uniform(KEY, (24, 4, 5, 1)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    keywords = {"eps": 0.05, "num_steps": 8}
    together = multi_targeted(logits_fn, x, y, KEY, **keywords)
    targets = jax.vmap(lambda z, y: likeliest_wrong(z, y, 9)[0])(logits_fn(x), y)
    assert targets.shape == (24, 4)

    @jax.jit
    @jax.vmap
    def run(x, y, key, target):
        def loss(logits, y):
            return losses.targeted_margin(logits, y, target[None])

        return pgd(logits_fn, x[None], y[None], key[None], loss=loss, **keywords)[0]

    keys = [fold_each(example_keys(KEY, 24), rank + 2) for rank in range(4)]
    apart = [run(x, y, key, target) for key, target in zip(keys, targets.T, strict=True)]
    margins = np.stack([losses.margin(logits_fn(z), y) for z in apart])
    np.testing.assert_allclose(losses.margin(logits_fn(together), y), margins.min(0), atol=1e-4)
    assert len(set(margins.argmin(0))) > 1
    assert 0 < (margins.min(0) < 0).sum() < 24
    # A single target, the likeliest wrong class, gives the first run.
    first = multi_targeted(logits_fn, x, y, KEY, num_targets=1, **keywords)
    np.testing.assert_allclose(losses.margin(logits_fn(first), y), margins[0], atol=1e-4)


def test_two_classes_and_restarts():
    logits_fn, _, _ = make_linear(KEY, (6, 3, 1), num_classes=2)
    x = np.asarray(interior_images(KEY, 8, (6, 3, 1)))
    y = np.asarray(logits_fn(x)).argmax(-1)
    x_adv = multi_targeted(logits_fn, x, y, KEY, eps=0.5, num_targets=9, num_restarts=2)
    assert (jnp.argmax(logits_fn(x_adv), -1) != y).all()

"""benchmarks/: networks that are the same on both sides, and what counts as broken. Needs torch."""

import jax
import numpy as np
import pytest

from robust_jax import losses, models

torch = pytest.importorskip("torch")

from benchmarks import compare_attacks, foreign, torch_bridges, torch_models  # noqa: E402
from benchmarks.attack_peers import Budget  # noqa: E402
from benchmarks.compare_attacks import Outcome, Side  # noqa: E402

BUDGET = Budget("linf", 0.1, 5, 1, 2, 10, 5, 5, batch_size=2, num_classes=10)
NETWORKS = {
    "lenet5": (models.LeNet5(num_classes=10, mean=(0.1,), std=(0.3,)), torch_models.LeNet5, 28, 1),
    "preact_resnet": (
        models.PreActResNet(num_classes=10, width=1 / 16, mean=(0.5, 0.4, 0.3), std=(0.2,)),
        torch_models.PreActResNet,
        32,
        3,
    ),
}


def test_bridges_have_the_modules_logits_and_gradients(monkeypatch):
    monkeypatch.setattr(torch_bridges, "NUM_EPOCHS", 1)
    module, x, y = torch_bridges.trained()
    images, labels = torch.tensor(x[:3].transpose(0, 3, 1, 2).copy()), torch.tensor(y[:3])
    images.requires_grad_(True)
    logits = module(images)
    loss = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="sum")
    gradient = torch.autograd.grad(loss, images)[0].numpy().transpose(0, 2, 3, 1)
    for bridge in (torch_bridges.through_callback, torch_bridges.plainly):
        network = bridge(module)
        np.testing.assert_allclose(network(x[:3]), logits.detach().numpy(), atol=1e-5)
        found = jax.grad(lambda x, f=network: losses.cross_entropy(f(x), y[:3]).sum())(x[:3])
        np.testing.assert_allclose(found, gradient, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_has_the_same_network(name):
    model, make_net, size, channels = NETWORKS[name]
    x = jax.random.uniform(jax.random.key(0), (2, size, size, channels))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    rng = np.random.default_rng(0)  # statistics and biases like those after training
    variables = jax.tree.map(lambda a: a + rng.uniform(0, 0.3, a.shape).astype("f"), variables)

    net = torch_models.from_flax(make_net(model), variables)
    assert make_net(model).to("meta").mean.is_meta  # the whole module moves to a device
    logits = np.asarray(model.apply(variables, x))
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(net(torch_models.to_torch(x)).numpy(), logits, rtol=1e-4, atol=1e-4)
    back = torch_models.to_flax(net, jax.eval_shape(lambda: variables))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, back))
    np.testing.assert_array_equal(torch_models.to_numpy(torch_models.to_torch(x)), x)


def shift_side(shift):
    """A network that says 1 for images brighter than 0.5, attacked by making them brighter."""

    def attack(x, y, keys, seed):
        assert len(x) == len(y) == len(keys) <= BUDGET.batch_size
        return x + np.float32(shift)

    names = ("pgd", "nearest_fab")
    return Side("ours", lambda x: x.mean((1, 2, 3)) > 0.5, dict.fromkeys(names, attack))


def test_broken_means_misclassified_in_the_box_and_within_eps(tmp_path):
    images = [[0.46] * 4, [0.4] * 4, [0.98, 0.1, 0.1, 0.68], [0.6] * 4]
    x = np.array(images, np.float32).reshape(4, 2, 2, 1)
    y = np.zeros(4, int)

    def measure(shift, attack="pgd", seed=0):
        (outcome,) = compare_attacks.measure(
            [shift_side(shift)], attack, x, y, seed, BUDGET, tmp_path
        )
        return outcome

    # Broken, not reached, beyond the box, misclassified to begin with.
    outcome = measure(0.05)
    np.testing.assert_array_equal(outcome.broken, [True, False, False, True])
    np.testing.assert_allclose(outcome.distance, [0.05, np.inf, np.inf, 0], rtol=1e-5)
    np.testing.assert_array_equal(measure(0.15, seed=1).broken, [False, False, False, True])
    nearest = measure(0.15, "nearest_fab")
    np.testing.assert_array_equal(nearest.broken, [True, True, False, True])
    # What the folder holds is not measured again.
    np.testing.assert_array_equal(measure(0.0).broken, outcome.broken)


def test_sides_take_turns(tmp_path):
    turns = []

    def side(name, shift):
        def attack(x, y, keys, seed):
            turns.append(name)
            return x + np.float32(shift)

        return shift_side(0)._replace(name=name, attacks={"pgd": attack})

    x = np.full((3 * BUDGET.batch_size - 1, 2, 2, 1), 0.46, np.float32)
    y = np.zeros(len(x), int)
    found = compare_attacks.measure(
        [side("ours", 0.05), side("theirs", 0.0)], "pgd", x, y, 0, BUDGET, tmp_path
    )
    assert turns == ["ours", "theirs"] * 3
    assert [outcome.broken.mean() for outcome in found] == [1, 0]
    assert [len(outcome.broken) for outcome in found] == [len(x)] * 2
    assert [len(outcome.seconds) for outcome in found] == [3, 3]


def test_rows_count_over_seeds():
    def outcomes(*broken):
        return [
            Outcome(np.array(b, bool), np.where(b, 0.2, np.inf), np.array([i + 1.0, 4.0]))
            for i, b in enumerate(broken)
        ]

    ours, theirs = outcomes([1, 1, 0, 0], [1, 1, 1, 0]), outcomes([1, 0, 0, 1], [1, 0, 0, 1])
    row = compare_attacks.bounded_row(ours, theirs)
    assert row == ["37.5 ± 17.7", "50.0 ± 0.0", "-12.5 ± 17.7", "1.5 ± 0.7", "1.0 ± 0.0"]
    assert compare_attacks.disagreements(ours, theirs) == "only ours: 1; only theirs: 3"
    assert compare_attacks.nearest_row(ours[:1], theirs[:1])[:5] == [
        "50.0",
        "50.0",
        "0.2000",
        "0.2000",
        "1.0000",
    ]
    faster = [
        one._replace(seconds=theirs[0].seconds * share)
        for one, share in zip(ours, ([0.2, 0.3], [0.3, 1]), strict=True)
    ]
    theirs = [theirs[0], theirs[0]]
    assert compare_attacks.seconds_row(faster, theirs) == ["2.85", "5", "0.30", "0.20 to 1.00"]


def test_folder_belongs_to_one_comparison(tmp_path):
    compare_attacks.claim(tmp_path, {"eps": 0.1})
    compare_attacks.claim(tmp_path, {"eps": 0.1})
    with pytest.raises(SystemExit, match="another --out"):
        compare_attacks.claim(tmp_path, {"eps": 0.2})


@pytest.mark.parametrize("name", foreign.NETS)
def test_the_two_sides_of_a_foreign_network_compute_the_same(name):
    """Timed Jacobian norms agree to 1e-3, and timed attacks in the loss that they reach."""
    assert set(foreign.jacobians(name)) == {"ours", "torch.func"}
    module, network, shape = foreign._network(name)
    x, y = foreign.images(shape, foreign.BATCH_SIZE)
    ours, *theirs = (side() for side in foreign.pgd(name).values())
    loss = {
        "before": losses.cross_entropy(network(x), y).mean(),
        "ours": losses.cross_entropy(network(ours), y).mean(),
    }
    assert np.abs(np.asarray(ours) - x).max() <= foreign.EPS + 1e-6
    for points in theirs:
        images = points.detach().permute(0, 2, 3, 1).numpy()
        assert np.abs(images - x).max() <= foreign.EPS + 1e-6
        found = losses.cross_entropy(network(images), y).mean()
        assert found > loss["before"] and abs(found - loss["ours"]) < 0.1 * found

"""Data: sources, splits, streams that are a function of the position, padding, augmentation."""

import functools
import io
import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from configs import default, imagenet_resnet50_at
from robust_jax import data
from robust_jax.app.experiment import build
from robust_jax.data.splits import resized
from robust_jax.errors import UserError
from robust_jax.train.loop import train


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", validation_size=197)


def test_digits_are_all_there_and_split_without_overlap(digits):
    splits = (digits.train, digits.validation, digits.test)
    assert [len(s.labels) for s in splits] == [1100, 197, 500]
    everything = np.concatenate([s.images.reshape(len(s.labels), -1) for s in splits])
    from sklearn.datasets import load_digits

    original = load_digits().data / 16
    assert sorted(map(tuple, everything)) == sorted(map(tuple, original.astype(np.float32)))
    assert digits.image_shape == (8, 8, 1)
    assert everything.min() == 0
    assert everything.max() == 1
    everything = np.concatenate([digits.train.images, digits.validation.images])
    np.testing.assert_allclose(digits.mean[0], everything.mean(), rtol=1e-6)


def test_seed_moves_validation_but_never_the_test_set(digits):
    other = data.load("digits", validation_size=197, seed=1)
    np.testing.assert_array_equal(digits.test.images, other.test.images)
    assert (digits.validation.images != other.validation.images).any()
    again = data.load("digits", validation_size=197, seed=1)
    np.testing.assert_array_equal(other.validation.images, again.validation.images)


def test_a_part_of_the_training_set_leaves_validation_and_test_as_they_are(digits):
    few = data.load("digits", validation_size=197, train_size=50)
    assert few.train.size == 50
    assert {im.tobytes() for im in few.train.images} <= {im.tobytes() for im in digits.train.images}
    np.testing.assert_array_equal(few.validation.images, digits.validation.images)
    np.testing.assert_array_equal(few.test.images, digits.test.images)
    assert few.mean == digits.mean


def test_labelled_subset_is_balanced_and_seeded():
    one, same, other = (
        data.load("digits", validation_size=197, num_labeled=50, seed=s).train.labels
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(np.bincount(one[one >= 0]), [5] * 10)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(3, 40), st.integers(1, 60), st.integers(0, 5))
def test_stream_drops_nothing_and_depends_on_the_position_only(size, batch, seed):
    index = np.arange(100, 100 + size)
    whole = data.Stream(index, (seed,))[0 : 4 * size]
    for epoch in range(4):
        np.testing.assert_array_equal(np.sort(whole[epoch * size : (epoch + 1) * size]), index)
    fresh = data.Stream(index, (seed,))
    for start in range((4 * size // batch - 1) * batch, -1, -batch):  # backwards, as no run does
        np.testing.assert_array_equal(fresh[start : start + batch], whole[start : start + batch])


def test_epochs_differ():
    stream = data.Stream(np.arange(50), (0,))
    assert (stream[0:50] != stream[50:100]).any()


def test_semi_supervised_batches_hold_the_same_number_of_labels():
    split = data.load("digits", validation_size=197, num_labeled=100).train
    batches = data.TrainBatches(split, batch_size=32, num_labeled_in_batch=8, seed=0)
    for step in (0, 5, 77):
        batch = batches[step]
        assert (batch["label"] >= 0).sum() == 8
        assert batch["image"].shape == (32, 8, 8, 1)
        np.testing.assert_array_equal(batch["position"], np.arange(32))


def test_pixels_are_in_unit_range_from_either_dtype():
    np.testing.assert_allclose(
        data.to_pixels(jnp.asarray([[0, 128, 255]], jnp.uint8)), [[0, 128 / 255, 1]]
    )
    assert data.to_pixels(jnp.asarray([0.5], jnp.bfloat16)).dtype == jnp.bfloat16


def test_augmentation_crops_and_flips_each_example_by_its_own_key():
    image = np.arange(1, 26, dtype=np.float32).reshape(1, 5, 5, 1) / 25
    images = jnp.asarray(np.repeat(image, 400, 0))
    keys = jax.random.split(jax.random.key(0), 400)
    flipped = np.asarray(data.augment(images, keys, crop_padding=0, flip=True))
    is_flip = np.array([(f == image[0, :, ::-1]).all() for f in flipped])
    is_same = np.array([(f == image[0]).all() for f in flipped])
    assert (is_flip ^ is_same).all()
    assert 0.4 < is_flip.mean() < 0.6
    cropped = np.asarray(data.augment(images, keys, crop_padding=1, flip=False))
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 5, j : j + 5].tobytes() for i in range(3) for j in range(3)}
    assert {c.tobytes() for c in cropped} == windows
    unchanged = data.augment(images, keys, crop_padding=0, flip=False)
    assert unchanged is images
    np.testing.assert_array_equal(
        data.augment(images[7:9], keys[7:9], crop_padding=1, flip=False), cropped[7:9]
    )


def save(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 6, 7), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (9, 6, 7), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    } | changes
    np.savez(path, allow_pickle=True, **{k: v for k, v in arrays.items() if v is not None})
    return f"npz:{path}"


def test_npz_of_grey_images(tmp_path):
    dataset = data.load(save(tmp_path / "a.npz"), validation_size=5)
    assert dataset.image_shape == (6, 7, 1)
    assert dataset.num_classes == 3
    assert [len(s.labels) for s in (dataset.train, dataset.validation, dataset.test)] == [25, 5, 9]


def test_npz_of_float_colour_images(tmp_path):
    x = np.random.default_rng(0).random((12, 4, 4, 3))
    source = save(
        tmp_path / "a.npz",
        x_train=x,
        y_train=np.arange(12) % 2,
        x_test=x[:4],
        y_test=np.arange(4) % 2,
    )
    dataset = data.load(source, validation_size=2)
    assert dataset.train.images.dtype == np.float32
    assert len(dataset.mean) == 3


def test_npz_may_have_fewer_test_images_than_classes(tmp_path):
    labels = np.arange(30) % 15
    found = data.load(
        save(tmp_path / "a.npz", y_train=labels, y_test=labels[-9:]), validation_size=5
    )
    assert found.num_classes == 15 and found.test.labels.max() == 14


BAD_NPZ = {
    "missing key": ({"y_test": None}, "lacks y_test; needed: x_train, y_train, x_test, y_test"),
    "objects inside": ({"y_train": np.array([{}] * 30)}, "never unpickled"),
    "image dtype": ({"x_train": np.zeros((30, 6, 7), np.int64)}, "must be uint8 in 0…255"),
    "image rank": ({"x_train": np.zeros((30, 6), np.uint8)}, r"\[N,H,W\] or \[N,H,W,C\]"),
    "channels first": (
        {"x_train": np.zeros((30, 3, 6, 7), np.uint8)},
        r"channels first; images are \[N,H,W,C\]: x_train.transpose\(0, 2, 3, 1\)",
    ),
    "pixel range": ({"x_train": np.full((30, 6, 7), 255.0)}, r"must be in \[0, 1\]"),
    "nan pixels": ({"x_train": np.full((30, 6, 7), np.nan)}, r"must be in \[0, 1\]"),
    "label dtype": ({"y_train": np.zeros(30)}, "must hold integers, not float64"),
    "label shape": ({"y_train": np.zeros((30, 1), int)}, r"must be \[30\], one label an image"),
    "negative label": ({"y_train": np.arange(30) - 1}, "labels run from 0 to K-1"),
    "unseen label": ({"y_test": np.arange(9)}, "which y_train, with labels 0 to 2, does not"),
    "a gap in the labels": ({"y_train": np.arange(30) % 3 * 2}, "has no label 1; labels run from"),
    "a label out of all range": ({"y_train": np.arange(30) + 2**32}, "labels run from 0 to K-1"),
    "one test image": (
        {"x_test": np.zeros((1, 6, 7), np.uint8), "y_test": np.zeros(1, int)},
        "one image only",
    ),
    "one class": ({"y_train": np.zeros(30, int)}, "one class only"),
    "two shapes": ({"x_test": np.zeros((9, 7, 7), np.uint8)}, "differ in image shape"),
    "two dtypes": ({"x_test": np.zeros((9, 6, 7), np.float32)}, "x_train is uint8, x_test float32"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_is_refused_in_one_line(case, tmp_path):
    changes, message = BAD_NPZ[case]
    with pytest.raises(UserError, match=message) as error:
        data.load(save(tmp_path / "a.npz", **changes), validation_size=5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "not a readable npz"),
        (b"text", "not a readable npz"),
        (b"PK\x03\x04 cut", "not a readable"),
    ],
)
def test_unreadable_npz_is_refused(content, message, tmp_path):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(f"npz:{path}", validation_size=5)


def test_a_truncated_npz_is_refused(tmp_path):
    save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable npz"):
        data.load(f"npz:{tmp_path / 'a.npz'}", validation_size=5)


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    """Images of a small MNIST in TFDS's real format, since nothing may be downloaded here."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)

    def examples(start, stop):
        for i in range(start, stop):
            png = io.BytesIO()  # TFDS would need TensorFlow to encode an array
            Image.fromarray(images[i, ..., 0]).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, "label": i % 10}

    folder = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder_cls("mnist")(data_dir=folder, file_format="array_record")
    builder._split_generators = lambda *_: {"train": examples(0, 30), "test": examples(30, 50)}
    builder.download_and_prepare()
    return images, str(folder)


def test_tfds_reads_what_its_own_builder_wrote(small_mnist):
    images, folder = small_mnist
    dataset = data.load("tfds:mnist", validation_size=10, data_dir=folder)
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.num_classes == 10
    assert len(dataset.train.labels) == 20
    got = sorted(im.tobytes() for im in dataset.test.images)
    assert got == sorted(im.tobytes() for im in images[30:])


@pytest.mark.parametrize(
    ("feature", "changes", "message"),
    [
        ("image", {"np_dtype": np.uint16}, "images of uint16; what is read is uint8"),
        ("image", {"np_dtype": np.float32}, "images of float32; what is read is uint8"),
        ("label", {}, "labels of SimpleNamespace; they must be a ClassLabel"),
    ],
)
def test_tfds_images_and_labels_of_other_types_are_refused(
    feature, changes, message, small_mnist, monkeypatch
):
    import tensorflow_datasets as tfds

    real = tfds.builder("mnist", data_dir=small_mnist[1], file_format="array_record")
    features = {**real.info.features, feature: SimpleNamespace(shape=(28, 28, 1), **changes)}
    info = SimpleNamespace(features=features, splits=real.info.splits)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: SimpleNamespace(info=info))
    with pytest.raises(UserError, match=message):
        data.load("tfds:mnist", validation_size=10, data_dir=small_mnist[1])


def test_a_streamed_set_gives_the_batches_of_the_one_in_memory(small_mnist):
    """It starts at any step, as a resumed run does, and gives each process its own rows."""
    load = functools.partial(
        data.load, "tfds:mnist", validation_size=10, data_dir=small_mnist[1], seed=3
    )
    whole, streamed = load(), load(streaming=True)
    assert isinstance(streamed.train, data.Streamed) and isinstance(streamed.test, data.Streamed)
    assert streamed.image_shape == whole.image_shape
    np.testing.assert_array_equal(streamed.validation.images, whole.validation.images)
    np.testing.assert_allclose(streamed.mean, whole.mean)  # over all images, since they are few
    in_turn = {
        (name, start, rows): list(
            itertools.islice(
                data.TrainBatches(
                    split, batch_size=8, num_labeled_in_batch=8, seed=1, rows=slice(*rows)
                ).starting_at(start),
                9 - start,
            )
        )
        for name, split in (("whole", whole.train), ("streamed", streamed.train))
        for start in (0, 4)
        for rows in ((0, 8), (4, 8))
    }
    everything = in_turn["whole", 0, (0, 8)]
    for (_, start, rows), batches in in_turn.items():
        for batch, expected in zip(batches, everything[start:], strict=True):
            for field, values in expected.items():
                np.testing.assert_array_equal(batch[field], values[slice(*rows)])


def test_a_training_run_on_a_stream_ends_as_one_in_memory(small_mnist, tmp_path):
    found = {}
    for streaming in (False, True):
        config = default.get_config()
        config.update(
            dataset="tfds:mnist",
            data_dir=small_mnist[1],
            validation_size=10,
            streaming=streaming,
            batch_size=8,
            duration="4 steps",
            seed=0,
            loss_on="clean",
            validation_attack={"name": "fgsm", "eps": 0.0},
        )
        config.model = {"name": "mlp", "hidden": (4,)}
        config.adversary = None
        config.attacks = ConfigDict()
        plan = build(config).plan
        found[streaming] = jax.device_get(train(plan, tmp_path / str(streaming)).last.params)
    chex.assert_trees_all_equal(found[False], found[True])


@pytest.mark.parametrize("shape", [(30, 40, 3), (41, 20, 1), (16, 16, 3)])
def test_images_are_scaled_and_cut_to_their_middle(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    out = resized(image, 16)
    assert out.shape == (16, 16, shape[2]) and out.dtype == np.uint8
    mirrored = resized(np.ascontiguousarray(image[:, ::-1]), 16)
    assert np.abs(np.int32(mirrored[:, ::-1]) - out).max() <= 1  # the middle, and not a corner
    np.testing.assert_array_equal(resized(np.full(shape, 7, np.uint8), 16), 7)
    if shape[:2] == (16, 16):
        np.testing.assert_array_equal(out, image)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"streaming": True}, "streaming is for tfds: sets; the data set is 'digits'"),
        ({"image_size": 32}, "image_size is for tfds: sets"),
        ({"test_split": "validation"}, "test_split is for tfds: sets"),
    ],
)
def test_only_tfds_sets_are_streamed_or_resized(keywords, message):
    with pytest.raises(UserError, match=message):
        data.load("digits", validation_size=197, **keywords)


def test_the_imagenet_config_streams_images_of_any_size(tmp_path):
    """JPEGs in TFDS's format for ImageNet: read, cut, and taken into a step of a small net."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)

    def examples(count):
        for i in range(count):
            jpeg = io.BytesIO()
            size = (*rng.integers(20, 60, 2), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(jpeg, "JPEG")
            jpeg.seek(0)
            yield i, {"image": jpeg, "label": i, "file_name": f"{i}.JPEG"}

    builder = tfds.builder_cls("imagenet2012")(data_dir=tmp_path, file_format="array_record")
    builder._split_generators = lambda *_: {"train": examples(20), "validation": examples(6)}
    builder.download_and_prepare()
    config = imagenet_resnet50_at.get_config()
    config.update(data_dir=str(tmp_path), validation_size=4, image_size=0, batch_size=8)
    with pytest.raises(UserError, match="images of varying size .*; give image_size"):
        build(config)
    config.image_size = 32
    config.model = ConfigDict({"name": "mlp", "hidden": (4,)})
    plan = build(config).plan
    batch = next(plan.batches.starting_at(0))
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert len(set(batch["label"])) == 8
    state, sums = jax.eval_shape(lambda: plan.train_step(plan.init(), batch, plan.key))
    assert sums["loss"][0].shape == ()


def test_a_stream_has_all_its_labels_and_the_split_that_is_named(small_mnist):
    load = functools.partial(
        data.load, "tfds:mnist", validation_size=10, data_dir=small_mnist[1], streaming=True
    )
    with pytest.raises(UserError, match="num_labeled needs the labels in memory"):
        load(num_labeled=10)
    with pytest.raises(UserError, match=r"splits train and middle \(test_split\)"):
        load(test_split="middle")
    assert load(image_size=14).image_shape == (14, 14, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar10", "choices: digits, tfds:<name>, npz:<path>"),
        ("tfds:", "choices: digits, tfds:<name>, npz:<path>"),
        ("tfds:mnst", "did you mean mnist"),
        ("tfds:mnist/foo", "tfds:mnist/foo cannot be opened"),
        ("tfds:mnist", r"not prepared as array_record .* prepare it with: python -c"),
    ],
)
def test_unknown_and_unprepared_sources_are_refused(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        data.load(source, validation_size=10, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"validation_size": 0}, "between 1 and 1296"),
        ({"validation_size": 5000}, "between 1 and 1296"),
        ({"validation_size": 197, "train_size": 1101}, "train_size is 1101.*between 1 and 1100"),
        ({"validation_size": 197, "num_labeled": 55}, "multiple of the 10 classes"),
        ({"validation_size": 197, "num_labeled": 10**6}, "up to"),
    ],
)
def test_bad_split_sizes_are_refused(keywords, message):
    with pytest.raises(UserError, match=message):
        data.load("digits", **keywords)


def test_a_channel_without_spread_is_not_blown_up(tmp_path, rng):
    """An adversary would move an opaque alpha, for example, by its eps over next to nothing."""
    images = rng.integers(0, 256, size=(30, 4, 5, 4), dtype=np.uint8)
    images[..., 3] = 255
    y = np.arange(30) % 3
    np.savez(tmp_path / "rgba.npz", x_train=images, y_train=y, x_test=images[:6], y_test=y[:6])
    dataset = data.load(f"npz:{tmp_path / 'rgba.npz'}", validation_size=6)
    assert dataset.std[3] == 1 and dataset.mean[3] == 1
    assert all(0.2 < spread < 0.4 for spread in dataset.std[:3])

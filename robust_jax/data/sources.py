"""Where image classification data comes from: digits, any TFDS set, or an npz file.

Nothing is ever unpickled.
"""

import dataclasses
import difflib
import zipfile
from pathlib import Path

import numpy as np

from robust_jax.data.splits import UNLABELED, Split, Streamed
from robust_jax.errors import UserError
from robust_jax.files import UNREADABLE_NPZ

SOURCES = "digits, tfds:<name>, npz:<path>"
# How many images of a streamed set the pixel statistics are measured on.
_MOST_MEASURED = 2048
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set's splits, with the mean and standard deviation of the training pixels [C].

    A streamed set keeps train and test on disk; mean and deviation are of some training images.
    """

    name: str
    train: Split | Streamed
    validation: Split
    test: Split | Streamed
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.validation.image_shape


def load(
    source: str,
    *,
    validation_size: int,
    train_size: int | None = None,
    num_labeled: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    test_split: str = "test",
    image_size: int = 0,
    streaming: bool = False,
) -> Dataset:
    """The data set that `source` names: digits, tfds:<name> or npz:<path>.

    validation_size examples, drawn by seed, are split off the training set, and train_size of the
    others are kept. num_labeled, a multiple of the number of classes, keeps that many labels, the
    same number in each class, and sets the others to -1. The rest are for TFDS sets: test_split
    names the split that becomes test, image_size is the side that images are scaled and cut to (0
    leaves them as they are), and streaming leaves train and test on disk. Raises UserError for what
    a user can correct.
    """
    kind, _, argument = source.partition(":")
    for_tfds = {
        "test_split": test_split != "test",
        "image_size": image_size,
        "streaming": streaming,
    }
    for field, is_set in for_tfds.items():
        if is_set and kind != "tfds":
            raise UserError(f"{field} is for tfds: sets; the data set is {source!r}")
    if streaming and num_labeled is not None:
        raise UserError("num_labeled needs the labels in memory; streaming leaves them on disk")
    train: Split | Streamed
    test: Split | Streamed
    if source == "digits":
        train, test, num_classes = _digits()
    elif kind == "tfds" and argument:
        train, test, num_classes = _tfds(argument, data_dir, test_split, image_size)
        if not streaming:
            train, test = (split.take(np.arange(split.size)) for split in (train, test))
    elif kind == "npz" and argument:
        train, test, num_classes = _npz(Path(argument).expanduser())
    else:
        raise UserError(f"there is no data set {source!r}; choices: {SOURCES}")
    # Measured before the split, so that all seeds share the statistics and the compiled programs.
    some = np.linspace(0, train.size - 1, min(train.size, _MOST_MEASURED)).astype(int)
    measured = train if isinstance(train, Split) else train.take(some)
    mean, std = _pixel_statistics(measured.images)
    train, validation = _split_off(train, validation_size, train_size, seed)
    if num_labeled is not None and isinstance(train, Split):
        train = _keep_labels(train, num_labeled, num_classes, seed)
    return Dataset(source, train, validation, test, num_classes, mean, std)


def _digits() -> tuple[Split, Split, int]:
    """scikit-learn's 1,797 real 8×8 digits; 500 of them, always the same, are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    everything = Split(images, digits.target.astype(np.int32))
    return everything.take(order[500:]), everything.take(order[:500]), 10


def _tfds(
    name: str, data_dir: str | None, test_split: str, image_size: int
) -> tuple[Streamed, Streamed, int]:
    import tensorflow_datasets as tfds

    where = f", data_dir={data_dir!r}" if data_dir else ""
    prepare = f"python -c \"import tensorflow_datasets as tfds; tfds.data_source('{name}'{where})\""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), 1
        )
        hint = f"did you mean {close[0]}?" if close else "see tensorflow.org/datasets/catalog"
        raise UserError(f"TFDS has no data set {name!r}; {hint}") from None
    except Exception as error:  # TFDS has no base class for what it raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "file format" in reason.lower():
            reason += "; prepare it once more as array_record, in another data_dir"
        raise UserError(f"tfds:{name} cannot be opened: {reason}") from error
    if not builder.info.splits:
        raise UserError(
            f"tfds:{name} is not prepared as array_record in {builder.data_dir}; "
            f"prepare it with: {prepare}"
        )
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features) or not {"train", test_split} <= set(splits):
        raise UserError(
            f"tfds:{name} needs features image and label and splits train and "
            f"{test_split} (test_split); it has {', '.join(features)} and "
            f"{', '.join(splits)}"
        )
    if (dtype := np.dtype(features["image"].np_dtype)) != np.uint8:
        raise UserError(
            f"tfds:{name} has images of {dtype}; what is read is uint8 "
            "in 0…255 (save others as float32 in [0,1] with numpy.savez, for npz:<path>)"
        )
    if not hasattr(features["label"], "num_classes"):
        raise UserError(
            f"tfds:{name} has labels of {type(features['label']).__name__}; they must be a "
            "ClassLabel, which says how many classes there are"
        )
    shapes = features["image"].shape
    if None in shapes and not image_size:
        raise UserError(
            f"tfds:{name} has images of varying size {shapes}; "
            "give image_size, the side they are scaled and cut to"
        )
    sources = (builder.as_data_source(split) for split in ("train", test_split))
    train, test = (Streamed(s, np.arange(len(s)), image_size) for s in sources)
    return train, test, features["label"].num_classes


def _npz(path: Path) -> tuple[Split, Split, int]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a readable npz file; save one with numpy.savez")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := [key for key in _NPZ_KEYS if key not in archive]:
                raise UserError(
                    f"{path} lacks {', '.join(missing)}; needed: {', '.join(_NPZ_KEYS)}"
                    f"; found: {', '.join(archive) or 'nothing'}"
                )
            arrays = {key: archive[key] for key in _NPZ_KEYS}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the data set is npz:<path>") from None
    except UserError:
        raise
    except UNREADABLE_NPZ as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds Python objects, which are never unpickled; save plain "
                "arrays with numpy.savez"
            ) from error
        raise UserError(f"{path} is not a readable npz file: {error}") from error
    most = len(arrays["y_train"])  # an upper limit on classes, as each has a training image
    splits = [
        Split(
            _npz_images(path, f"x_{s}", arrays[f"x_{s}"]),
            _npz_labels(path, f"y_{s}", arrays[f"y_{s}"], len(arrays[f"x_{s}"]), most),
        )
        for s in ("train", "test")
    ]
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{path}: x_train and x_test differ in image shape: "
            f"{train.images.shape[1:]} and {test.images.shape[1:]}"
        )
    if train.images.dtype != test.images.dtype:
        raise UserError(f"{path}: x_train is {train.images.dtype}, x_test {test.images.dtype}")
    num_classes = len(np.unique(train.labels))
    if train.labels.max() >= num_classes:
        absent = np.setdiff1d(np.arange(train.labels.max()), train.labels)[0]
        raise UserError(
            f"{path}: y_train goes up to {train.labels.max()} but has no label {absent}; labels "
            "run from 0 to K-1 without a gap"
        )
    if len(test.labels) < 2:
        raise UserError(f"{path}: x_test holds one image only; a mean needs more")
    if num_classes < 2:
        raise UserError(f"{path}: y_train holds one class only; at least two are needed")
    if test.labels.max() >= num_classes:
        raise UserError(
            f"{path}: y_test has label {test.labels.max()}, which y_train, with labels "
            f"0 to {num_classes - 1}, does not"
        )
    return train, test, num_classes


def _npz_images(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"{path}: {key} must be [N,H,W] or [N,H,W,C] and not empty, not {images.shape}"
        )
    if images.shape[1] <= 4 < images.shape[3]:
        raise UserError(
            f"{path}: {key} has the shape {list(images.shape)}, with channels first; images are "
            f"[N,H,W,C]: {key}.transpose(0, 2, 3, 1)"
        )
    if images.dtype not in (np.uint8, np.float32, np.float64):
        raise UserError(
            f"{path}: {key} must be uint8 in 0…255 or float32 in [0,1], not {images.dtype}"
        )
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{path}: {key} ranges over [{low:g}, {high:g}]; float pixels must be in "
            "[0, 1] (divide by 255?)"
        )
    return images.astype(np.float32)


def _npz_labels(path: Path, key: str, labels: np.ndarray, num_images: int, most: int) -> np.ndarray:
    if labels.shape != (num_images,):
        raise UserError(
            f"{path}: {key} must be [{num_images}], one label an image, not {list(labels.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: {key} must hold integers, not {labels.dtype}")
    if labels.min() < 0 or labels.max() >= most:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{path}: {key} has label {wrong}; labels run from 0 to K-1")
    return labels.astype(np.int32)


def _split_off(
    train: Split | Streamed, size: int, train_size: int | None, seed: int
) -> tuple[Split | Streamed, Split]:
    num_examples = train.size
    if not 0 < size < num_examples:
        raise UserError(
            f"validation_size is {size}; it must be between 1 and "
            f"{num_examples - 1}, {num_examples} being the training set"
        )
    if train_size is not None and not 0 < train_size <= num_examples - size:
        raise UserError(
            f"train_size is {train_size}; it must be between 1 and {num_examples - size}, "
            "or left out for all"
        )
    order = np.random.default_rng([seed, 2]).permutation(num_examples)
    left = order[size:][:train_size]
    return train.part(np.sort(left)), train.take(np.sort(order[:size]))


def _keep_labels(train: Split, num_labeled: int, num_classes: int, seed: int) -> Split:
    counts = np.bincount(train.labels, minlength=num_classes)
    per_class, rest = divmod(num_labeled, num_classes)
    if rest or not 0 < per_class <= counts.min():
        raise UserError(
            f"num_labeled is {num_labeled}; it must be a multiple of the "
            f"{num_classes} classes, up to {counts.min() * num_classes}"
        )
    order = np.random.default_rng([seed, 3]).permutation(len(train.labels))
    kept = np.concatenate([order[train.labels[order] == k][:per_class] for k in range(num_classes)])
    labels = np.full_like(train.labels, UNLABELED)
    labels[kept] = train.labels[kept]
    return Split(train.images, labels)


def _pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    total = square = np.zeros(images.shape[-1])
    for start in range(0, len(images), 1024):  # float64 of all at once would be eight times as big
        chunk = images[start : start + 1024].astype(np.float64) / scale
        total = total + chunk.sum((0, 1, 2))
        square = square + (chunk**2).sum((0, 1, 2))
    count = images[..., 0].size
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    # An (almost) constant channel, such as an opaque alpha, is not scaled up.
    return tuple(map(float, mean)), tuple(map(float, np.where(std > _LEAST_SPREAD, std, 1.0)))


_LEAST_SPREAD = 1e-3  # a quarter of an 8-bit step

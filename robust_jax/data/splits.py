"""The examples of a data set's split, as arrays in memory or read on demand."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from robust_jax.errors import UserError

UNLABELED = -1
# How many decoded examples are held as dicts at a time, besides the arrays made from them.
_CHUNK = 1024


class Split(NamedTuple):
    """images [N,H,W,C], uint8 or floats in [0,1]; labels int32 [N], -1 where unlabelled."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    @property
    def labeled(self) -> np.ndarray:
        """The rows that have a label."""
        return np.flatnonzero(self.labels != UNLABELED)

    def take(self, index: np.ndarray) -> "Split":
        """These rows, in memory."""
        return Split(self.images[index], self.labels[index])

    def part(self, index: np.ndarray) -> "Split":
        """A split of these rows."""
        return self.take(index)


def rows_of(split: "Split | Streamed", index: np.ndarray) -> tuple[int, Callable]:
    """The number of rows, and take(i), which reads rows i of the index.

    A batch holds image, label and index [B], the example's place in the split.
    """

    def take(i):
        images, labels = split.take(index[i])
        return {"image": images, "label": labels, "index": index[i]}

    return len(index), take


@runtime_checkable
class RandomAccess(Protocol):
    """The interface of TFDS's data sources: examples by row number, many at a time."""

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Rows `index` of a random-access source of {"image": [H,W,C], "label"}; a `Split` on disk.

    image_size: the side of the square that every image becomes, scaled until its shorter side fits
    and then cut to the middle; 0 leaves images as they are stored.
    """

    source: RandomAccess
    index: np.ndarray
    image_size: int = 0

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def labeled(self) -> np.ndarray:
        """The rows that have a label: all of them, as labels are read only when needed."""
        return np.arange(self.size)

    def part(self, index: np.ndarray) -> "Streamed":
        return dataclasses.replace(self, index=self.index[index])

    def take(self, index: np.ndarray) -> Split:
        """These rows, read. Raises UserError for an example that has no label."""
        rows = [int(row) for row in self.index[index]]
        images, labels = [], []
        for start in range(0, len(rows), _CHUNK):
            for example in self.source.__getitems__(rows[start : start + _CHUNK]):
                image = example["image"]
                images.append(resized(image, self.image_size) if self.image_size else image)
                labels.append(example["label"])
        if min(labels, default=0) < 0:
            raise UserError("the data set has examples without a label")
        return Split(np.stack(images), np.asarray(labels, np.int32))


def resized(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "s s c"]:
    """The middle square of an image, its side scaled to size, antialiased."""
    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    cut = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))
    return cut.reshape(size, size, channels)

"""Image classification data: sources, splits in memory or on disk, streams, augmentation.

Images stay as they are stored, uint8 or floats in [0,1]; `to_pixels` turns either into floats in
[0,1] on the device.
"""

from robust_jax.data.images import augment, to_pixels
from robust_jax.data.sources import Dataset, load
from robust_jax.data.splits import UNLABELED, Split, Streamed, rows_of
from robust_jax.data.streams import Stream, TrainBatches

__all__ = [
    "UNLABELED",
    "Dataset",
    "Split",
    "Stream",
    "Streamed",
    "TrainBatches",
    "augment",
    "load",
    "rows_of",
    "to_pixels",
]

"""The order of training examples, a pure function of (seed, position), and the batches it gives."""

import itertools
from collections.abc import Iterator

import numpy as np

from robust_jax.data.splits import Split, Streamed

# How many batches of a streamed set are read at a time, each in its own thread.
_NUM_THREADS = 8


class Stream:
    """An endless stream of example indices: one seeded permutation of `index` after another.

    What it holds at a position is a pure function of (seed, position), so a resumed run sees just
    the examples that remain, and no example is dropped at the end of an epoch.
    """

    def __init__(self, index: np.ndarray, seed: tuple[int, ...]):
        self._index, self._seed = index, seed
        self._cached = (-1, index)

    def __getitem__(self, positions: slice) -> np.ndarray:
        where = np.arange(positions.start, positions.stop)
        parts = [
            self._epoch_order(epoch)[where[where // len(self._index) == epoch] % len(self._index)]
            for epoch in np.unique(where // len(self._index)).tolist()
        ]
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        cached, order = self._cached  # one pair, so that threads never mix two epochs
        if epoch != cached:
            order = np.random.default_rng([*self._seed, epoch]).permutation(self._index)
            self._cached = (epoch, order)
        return order


class TrainBatches:
    """The training batches of a run: batches[step] is a pure function of (seed, step).

    With an unlabelled part, num_labeled_in_batch rows of each batch come from the labelled
    examples and the others from the unlabelled ones. A batch holds image [B,H,W,C], label [B]
    and position [B], each row's place in the global batch, of which this process has `rows`.
    """

    def __init__(
        self,
        split: Split | Streamed,
        *,
        batch_size: int,
        num_labeled_in_batch: int,
        seed: int,
        rows: slice = slice(None),
    ):
        self._split, self._positions = split, np.arange(batch_size)[rows]
        labeled = split.labeled
        unlabeled = np.setdiff1d(np.arange(split.size), labeled)
        self._parts = [(Stream(labeled, (seed, 0)), num_labeled_in_batch)]
        if num_labeled_in_batch < batch_size:
            self._parts.append((Stream(unlabeled, (seed, 1)), batch_size - num_labeled_in_batch))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        index = np.concatenate(
            [stream[step * rows : (step + 1) * rows] for stream, rows in self._parts]
        )
        images, labels = self._split.take(index[self._positions])
        return {"image": images, "label": labels, "position": self._positions}

    def starting_at(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """self[step], self[step + 1], …; Grain reads those of a streamed set ahead."""
        if isinstance(self._split, Split):
            return map(self.__getitem__, itertools.count(step))
        import grain  # slow to import, and only streams need it

        batches = grain.MapDataset.range(step, 2**62).map(self.__getitem__)
        return iter(batches.to_iter_dataset(grain.ReadOptions(_NUM_THREADS, _NUM_THREADS)))

"""What AutoAttack's own code breaks of the images that ours left standing, on a run's network.

    python -m benchmarks.second_opinion --reference=../auto-attack --eps=0.1 \
        [--num_examples=100] WORKDIR…

For a surprising gain: two implementations hardly miss the same. A WORKDIR is a finished run of a
LeNet-5, small_cnn or PreActResNet with AutoAttack among its attacks; its weights go to PyTorch.
--reference is a checkout of github.com/fra31/auto-attack. Prints a markdown table.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks import torch_models
from benchmarks.torch_sequential import authors_autoattack
from robust_jax import data, models
from robust_jax.app import records, stored, subject

NETS = {
    models.LeNet5: torch_models.LeNet5,
    models.SmallCNN: torch_models.SmallCNN,
    models.PreActResNet: torch_models.PreActResNet,
}


def measure(workdir: Path, eps: float, num_examples: int) -> str:
    """A row of the table."""
    found = subject.load(workdir)
    net = torch_models.from_flax(NETS[type(found.model)](found.model), found.variables)
    table = records.read(workdir / "records" / "best.csv")
    standing = table["index"][records.held(table, "autoattack", eps).fillna(False).astype(bool)]
    images, labels = found.dataset.test.take(standing.to_numpy()[:num_examples])
    if not len(labels):
        return f"| {workdir} | 0 | 0 | 0 |"
    x = np.asarray(data.to_pixels(images))
    logits = np.asarray(found.logits_fn(x))
    np.testing.assert_allclose(net(torch_models.to_torch(x)), logits, rtol=1e-3, atol=1e-2)
    norm = stored.results(workdir)["threat"]["norm"]
    holds = authors_autoattack(net, x, labels, eps=eps, norm=norm)
    return f"| {workdir} | {len(standing)} | {len(x)} | {(~holds).sum()} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="a checkout of AutoAttack's own code")
    parser.add_argument("--eps", type=float, required=True)
    parser.add_argument("--num_examples", type=int, default=100)
    parser.add_argument("workdirs", type=Path, nargs="+")
    flags = parser.parse_args()
    sys.path.insert(0, flags.reference)
    print("| run | ours left standing | attacked again | broken by theirs |")
    print("|" + " --- |" * 4, flush=True)
    for workdir in flags.workdirs:
        print(measure(workdir, flags.eps, flags.num_examples), flush=True)


if __name__ == "__main__":
    main()

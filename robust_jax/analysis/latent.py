"""How the classes lie in a network's latent space, from latents [N,D] or [N,…] and labels [N].

Latents are a layer's values, such as "features" of `features.captured`; those of a whole data set
are gathered batch by batch with `batches.on_one_device`.
"""

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "distance_ratio",
    "projection",
    "silhouette",
    "tsne",
]


def __dir__() -> list[str]:
    return __all__


_Latents = Float[np.ndarray, "n ..."]
_Labels = Int[np.ndarray, " n"]


def projection(latents: _Latents) -> Float[np.ndarray, "n 2"]:
    """The latents on their first two principal axes, for plots; no distance is stretched.

    Costs an SVD of [N,D].

    Args:
        latents: [N,...].

    Returns:
        [N,2].

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import latent
        >>> latent.projection(np.eye(4)[:, :3]).shape
        (4, 2)
    """
    from sklearn.decomposition import PCA  # takes seconds, and most runs do without

    return PCA(2, svd_solver="full").fit_transform(_flat(latents))


def tsne(latents: _Latents, *, perplexity: float = 30.0, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """The latents in the plane by t-SNE, for plots like the paper's figure.

    Neighbours stay neighbours; distances between clusters and their sizes mean nothing. Costs
    seconds for a thousand examples.

    Args:
        latents: [N,...].
        perplexity: About how many neighbours each has; at most a third of N.
        seed: The seed of scikit-learn's draws; the start is the principal axes.

    Returns:
        [N,2]; zeros if all examples have the same latents.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import latent
        >>> latent.tsne(np.eye(6)).shape
        (6, 2)

    Reference:
        van der Maaten & Hinton 2008; the figure is that of Chen et al. 2019, arXiv 1903.09799.
    """
    from sklearn.manifold import TSNE

    latents = _flat(latents)
    if not np.ptp(latents, axis=0).any():  # scikit-learn would divide by their spread
        return np.zeros((len(latents), 2), np.float32)
    most = min(perplexity, (len(latents) - 1) / 3)
    return TSNE(perplexity=most, init="pca", random_state=seed).fit_transform(latents)


def silhouette(latents: _Latents, labels: _Labels) -> float:
    """Mean silhouette: higher where classes are tighter and further apart.

    (b - a) / max(a, b), a the mean l2 distance to the others of the same class, b to those of
    the nearest other class. Costs N² distances in D dimensions, of which scikit-learn holds 1 GiB
    at a time.

    Args:
        latents: [N,...].
        labels: [N].

    Returns:
        In [-1, 1]; NaN if there is only one class, or no two examples of a class.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import latent
        >>> latent.silhouette(np.array([[0.0], [1.0], [9.0], [10.0]]), np.array([0, 0, 1, 1]))
        0.889

    Reference:
        Rousseeuw 1987. As a measure of what arXiv 1903.09799 shows by t-SNE, it is ours.
    """
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(_flat(latents), labels))


def distance_ratio(latents: _Latents, labels: _Labels) -> float:
    """Mean l2 distance to a class's own centre over that between two centres: lower is tighter.

    Our reading of intra- over inter-class distance. Invariant to scale. Costs N distances and, for
    K classes, K² between centres.

    Args:
        latents: [N,...].
        labels: [N].

    Returns:
        At least 0; NaN if there is only one class, or all centres are the same.

    Example:
        >>> import numpy as np
        >>> from robust_jax.analysis import latent
        >>> latent.distance_ratio(np.array([[0.0], [1.0], [9.0], [10.0]]), np.array([0, 0, 1, 1]))
        0.0556
    """
    latents, labels = _flat(latents), np.asarray(labels)
    classes, index = np.unique(labels, return_inverse=True)
    centres = np.stack([latents[labels == c].mean(0) for c in classes])
    intra = np.linalg.norm(latents - centres[index], axis=-1).mean()
    inter = np.linalg.norm(centres[:, None] - centres, axis=-1).sum() / 2
    pairs = len(classes) * (len(classes) - 1) / 2
    return float(intra / (inter / pairs)) if inter > 0 else float("nan")


def _flat(latents: _Latents) -> Float[np.ndarray, "n d"]:
    latents = np.asarray(latents, np.float64)
    return latents.reshape(len(latents), -1)

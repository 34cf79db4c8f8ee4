"""How good the model is for each client: its accuracy on test samples in the client's own mix of classes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def mix(
    labels: np.ndarray, division: Sequence[Int[np.ndarray, " _"]], num_classes: int
) -> Float[np.ndarray, "N classes"]:
    """The part that each class has in the samples of each client; NaN for a client without samples.

    There are no classes where labels are not one integer for each sample.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return np.empty((len(division), 0))
    counts = np.array([np.bincount(labels[share], minlength=num_classes) for share in division], float)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def accuracies(
    by_class: Float[np.ndarray, " classes"], mix: Float[np.ndarray, "N classes"]
) -> Float[np.ndarray, " N"]:
    """The accuracy for each client: the mean over classes, weighted by the client's mix; NaN where unknown.

    by_class: the accuracy on the test samples of each class, NaN where the test samples have none. Such
    classes do not count.
    """
    if by_class.shape != mix.shape[1:] or not by_class.size:
        return np.full(len(mix), np.nan)
    is_known = np.isfinite(by_class)
    weights = mix[:, is_known]
    with np.errstate(invalid="ignore"):
        return weights @ np.asarray(by_class, np.float64)[is_known] / weights.sum(1)


def mean_and_worst(accuracies: Float[np.ndarray, " N"]) -> tuple[float | None, float | None]:
    """(mean, least) over the clients that are known; None where none is."""
    known = accuracies[np.isfinite(accuracies)]
    return (float(known.mean()), float(known.min())) if len(known) else (None, None)

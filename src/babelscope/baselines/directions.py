"""One direction per language in the space of the activations: difference of means, principal component, linear probe.

All take the mean activation of each text, float64 `[texts, d]`, in which every text counts equally.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

# Weight of the probe's L2 penalty, relative to the mean log loss of the texts; inputs have variance 1.
_PENALTY = 1e-3
# The fit ends after so many iterations, or when no derivative of the loss exceeds the tolerance (on the default, after
# 46: the directions then have a cosine of at least 0.999 with those of an exact fit, and all answers are the same).
_ITERATIONS, _TOLERANCE = 60, 1e-5


class Classifier(NamedTuple):
    """A linear score for every language; a text is identified as the language with the highest one.

    Attributes
    ----------
    weight, bias: `[languages, d]` and `[languages]`; the score of a text with mean activation x is `weight @ x + bias`.
    others: the mean of the texts in all other languages, `[languages, d]`.
    """

    weight: Floats
    bias: Floats
    others: Floats

    def scores(self, x: Floats) -> Floats:
        """The scores of texts `[texts, d]`: `[texts, languages]`."""
        found: Floats = x @ self.weight.T + self.bias
        return found

    @property
    def directions(self) -> Floats:
        """The weights with norm 1, `[languages, d]`."""
        rows: Floats = self.weight / np.maximum(np.linalg.norm(self.weight, axis=1, keepdims=True), 1e-30)
        return rows


def means(x: Floats, language: Codes, count: int) -> tuple[Floats, Floats]:
    """The mean over each language's texts, and over the texts of all others, in which languages count equally.

    `language`: code of each text, 0 to `count` - 1, each at least once. Two arrays `[count, d]`.
    """
    own = np.stack([x[language == code].mean(axis=0) for code in range(count)])
    return own, (own.sum(axis=0) - own) / max(1, count - 1)


def diff_mean(x: Floats, language: Codes, count: int) -> Classifier:
    """DiffMean (Marks and Tegmark 2023, arXiv 2310.06824): the own mean minus that of the others."""
    own, others = means(x, language, count)
    return _scaled(own - others, own, others)


def component(x: Floats, language: Codes, count: int) -> Classifier:
    """The first principal component of the language's texts and the others', of which each side has half the weight."""
    own, others = means(x, language, count)
    square = np.stack([x[language == code].T @ x[language == code] / (language == code).sum() for code in range(count)])
    every, rows = square.sum(axis=0), []
    for code in range(count):
        mean = (own[code] + others[code]) / 2
        moment = (square[code] + (every - square[code]) / max(1, count - 1)) / 2
        last = len(mean) - 1
        # The sign of the eigenvector is chosen by `_scaled`.
        rows.append(eigh(moment - np.outer(mean, mean), subset_by_index=[last, last])[1][:, 0])
    return _scaled(np.array(rows), own, others)


def probe(x: Floats, language: Codes, count: int) -> Classifier:
    """Multinomial logistic regression with an L2 penalty, fitted by L-BFGS on standardised inputs."""
    own, others = means(x, language, count)
    centre, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-12)
    z, truth, shape = (x - centre) / spread, np.eye(count)[language], (count, x.shape[1] + 1)
    # Languages count equally, however many texts they have.
    share = 1 / (count * np.bincount(language, minlength=count)[language])

    def loss(flat: Floats) -> tuple[float, Floats]:
        w = flat.reshape(shape)
        logits = z @ w[:, :-1].T + w[:, -1]
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = (np.exp(log_p) - truth) * share[:, None]
        gradient = np.hstack([error.T @ z + _PENALTY * w[:, :-1], error.sum(axis=0)[:, None]])
        value = -(share * (truth * log_p).sum(axis=1)).sum() + 0.5 * _PENALTY * (w[:, :-1] ** 2).sum()
        return float(value), gradient.ravel()

    options = {"maxiter": _ITERATIONS, "gtol": _TOLERANCE}
    # numpy and scipy have a BLAS library each, whose threads take the cores from each other: with 2 threads, the fit
    # takes 8 times as long as with 1.
    with threadpool_limits(1, user_api="blas"):
        w = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
    weight = (w[:, :-1] - w[:, :-1].mean(axis=0)) / spread
    return Classifier(weight, w[:, -1] - w[:, -1].mean() - weight @ centre, others)


METHODS: dict[str, Callable[[Floats, Codes, int], Classifier]] = {
    "diff_mean": diff_mean, "component": component, "probe": probe,
}  # fmt: skip


def _scaled(rows: Floats, own: Floats, others: Floats) -> Classifier:
    """Scores that are 1 for the mean of the own texts, and 0 for that of the others."""
    gap = ((own - others) * rows).sum(axis=1)
    weight = rows / np.where(np.abs(gap) > 1e-12, gap, np.inf)[:, None]
    return Classifier(weight, -(others * weight).sum(axis=1), others)

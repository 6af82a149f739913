"""The moments of activations, and their normalisation before an SAE is trained on them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.core.errors import UserError
from babelscope.models.hardware import one_thread

# Activations with fewer effective dimensions are whitened, since otherwise a few directions would take all latents.
_FEW = 16
# Whitening reduces the logarithm of each direction's variance by this share.
_WHITEN = 0.5


class Normalisation(NamedTuple):
    """Scales the mean squared norm to d, by a factor or, if there are few effective dimensions, by a matrix.

    Attributes
    ----------
    mean: float32 [d], mean of the activations.
    scale: the factor.
    forth, back: float32 [d, d], the matrix and its inverse (both symmetric); None if the factor is used.
    """

    mean: Tensor
    scale: float
    forth: Tensor | None = None
    back: Tensor | None = None


class Moments(NamedTuple):
    """Mean and covariance of activations.

    Attributes
    ----------
    mean: float32 [d].
    covariance: float64 [d, d].
    """

    mean: Tensor
    covariance: Tensor

    @property
    def scale(self) -> float:
        """The factor that scales the mean squared norm to d."""
        square = float(self.covariance.trace() + self.mean.double().square().sum())
        return float((len(self.mean) / square) ** 0.5) if square > 0 else 1.0

    @property
    def effective_dimensions(self) -> float:
        """Participation ratio of the spectrum, `(sum lambda)^2 / sum lambda^2`: 1 to d."""
        total = float(self.covariance.square().sum())
        return float(self.covariance.trace()) ** 2 / total if total > 0 else float(len(self.mean))

    def normalisation(self) -> Normalisation:
        """The normalisation for training an SAE on the activations."""
        return Normalisation(self.mean, self.scale, *(self.whitening() or ()))

    def whitening(self) -> tuple[Tensor, Tensor] | None:
        """Matrix [d, d] that flattens the spectrum, and its inverse (both symmetric); None if it is not needed.

        If a few directions hold most of the variance (a last layer, tokens with huge activations), a few latents serve
        every token, and most of the dictionary dies. The matrix maps a direction of variance lambda to one of variance
        `sqrt(lambda)`. It is folded into the weights after training (`benchmarks/sae_choices.py` measures its effect).
        """
        if self.effective_dimensions >= _FEW:
            return None
        with one_thread():
            values, directions = torch.linalg.eigh(self.covariance)
            values = values.clamp_min(float(values[-1]) * 1e-8)
            forth = directions * values ** (-_WHITEN / 2) @ directions.T
            mapped = Moments((self.mean.double() @ forth).float(), forth @ self.covariance @ forth)
            back = directions * values ** (_WHITEN / 2) @ directions.T
            return (forth * mapped.scale).float(), (back / mapped.scale).float()


def moments(chunks: Iterable[Tensor], name: str = "a hookpoint") -> Moments:
    """Moments of the rows of `chunks` ([rows, d] each, any floating dtype), summed in float64.

    Raises
    ------
    ValueError: there are no rows.
    UserError: all rows are the same, or some are not finite; the message names the hookpoint `name`.
    """
    rows, total, products = 0, torch.zeros(()), torch.zeros(())
    first = origin = torch.zeros(())
    differ = False
    for chunk in chunks:
        x = chunk.float()
        if not rows and len(x):
            # Sums are taken around the first chunk's mean: in float32, a mean far from 0 would hide a small variance.
            first, origin = x[0], x.mean(0, dtype=torch.float64).float()
        differ = differ or bool((x != first).any())
        rows += len(x)
        x = x - origin
        total = total + x.sum(0, dtype=torch.float64)
        products = products + (x.T @ x).double()
    if not rows:
        raise ValueError("no activations to normalise by")
    if not differ:
        raise UserError(f"params.yaml: hookpoints: {name} gives the same activations for all tokens; remove it")
    if not products.isfinite().all():
        raise UserError(
            f"data/activations: {name} has infinite or NaN activations; `make verify` tells whether files are damaged"
        )
    shift = total / rows
    return Moments((origin.double() + shift).float(), products / rows - shift.outer(shift))

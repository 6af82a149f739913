"""What activations are normalised by before an SAE is trained on them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.core.errors import UserError

# With fewer effective dimensions, a few directions would take all latents.
_FEW = 16
# Share of the logarithm of a direction's variance that is taken off then.
_WHITEN = 0.5


class Normalisation(NamedTuple):
    """What brings the mean squared norm to d: a factor or, if there are few effective dimensions, a matrix.

    Attributes
    ----------
    mean: float32 [d], of the activations.
    scale: the factor.
    forth, back: float32 [d, d], the matrix and its inverse (symmetric); None: the factor does it.
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
        """Brings the mean squared norm to d."""
        square = float(self.covariance.trace() + self.mean.double().square().sum())
        return float((len(self.mean) / square) ** 0.5) if square > 0 else 1.0

    @property
    def effective_dimensions(self) -> float:
        """Participation ratio of the spectrum, `(sum lambda)^2 / sum lambda^2`: 1 to d."""
        total = float(self.covariance.square().sum())
        return float(self.covariance.trace()) ** 2 / total if total > 0 else float(len(self.mean))

    def normalisation(self) -> Normalisation:
        """What an SAE's training normalises by."""
        return Normalisation(self.mean, self.scale, *(self.whitening() or ()))

    def whitening(self) -> tuple[Tensor, Tensor] | None:
        """Matrix [d, d] that evens out the spectrum, and its inverse (both symmetric); None if it is not needed.

        If a few directions hold most of the variance (a last layer, tokens with huge activations), a handful of latents
        serves every token, and most of the dictionary dies. The matrix maps a direction of variance lambda to one of
        variance `sqrt(lambda)`. It is folded into the weights after training (measured: `benchmarks/sae_choices.py`).
        """
        if self.effective_dimensions >= _FEW:
            return None
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
    ValueError: there is no row.
    UserError: all rows are the same, or some are not finite; the message calls them the activations of `name`.
    """
    rows, total, products = 0, torch.zeros(()), torch.zeros(())
    first = origin = torch.zeros(())
    others = False
    for chunk in chunks:
        x = chunk.float()
        if not rows and len(x):
            # Centred on the mean of the first chunk: in float32, a mean far from 0 would swallow a small variance.
            first, origin = x[0], x.mean(0, dtype=torch.float64).float()
        others = others or bool((x != first).any())
        rows += len(x)
        x = x - origin
        total = total + x.sum(0, dtype=torch.float64)
        products = products + (x.T @ x).double()
    if not rows:
        raise ValueError("no activations to normalise by")
    if not others:
        raise UserError(f"params.yaml: hookpoints: {name} gives the same activations for all tokens: nothing to learn")
    if not products.isfinite().all():
        raise UserError(
            f"data/activations: {name} has some that are infinite or not a number; make verify says if they are damaged"
        )
    shift = total / rows
    return Moments((origin.double() + shift).float(), products / rows - shift.outer(shift))

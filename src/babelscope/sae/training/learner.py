"""One SAE in training: its weights, its loss with what keeps latents alive, and what it remembers between steps."""

import torch
from torch import Tensor, nn

from babelscope.activations.moments import Moments
from babelscope.config.schema import Train
from babelscope.models.matmul import linear
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.kernels import fused
from babelscope.sae.training.dense import dense_step
from babelscope.sae.training.sharding import add_rows_, own, whole
from babelscope.sae.training.step import Step, sparse_step

# Rows of a step on which dead latents learn, and how many of these do: enough for their directions, and a fraction of
# the step's time and memory.
_AUX_ROWS, _AUX_LATENTS = 256, 8192
# `train.dead_after` null: so many times as long as a latent waits on average for its next firing.
_WAITS = 32
# Rows of the decoder that are projected at once: bounds the memory.
_CHUNK = 4096
# The weight of the sparsity penalty is steered until k latents are active: its logarithm by so much over the whole run
# for each multiple of k that they are too many, and at once by so many times its size.
_INTEGRAL, _PROPORTIONAL = 20.0, 3.0
# Last share of the steps over which BatchTopK's lowest activation is averaged to the threshold of inference.
_SETTLED = 0.05


class Learner(nn.Module):
    """An SAE in training, on normalised activations: their mean squared norm is their width (see `Moments`).

    Parameters
    ----------
    settings: the `train` section.
    target: of the activations to reconstruct.
    source: of the activations to encode, where they are others (transcoders).
    steps: how many the run has.
    seed: of the initialisation.
    """

    def __init__(self, settings: Train, target: Moments, source: Moments | None, *, steps: int, seed: int) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        self.dead_after = settings.dead_after or _WAITS * settings.latents // settings.k
        self.target = Normal(target)
        self.source = None if source is None else Normal(source)
        self.sae = initialise(
            self.target(target.mean),
            settings.latents,
            settings.k,
            encoder_scale=settings.encoder_scale,
            seed=seed,
            b_in=None if source is None or self.source is None else self.source(source.mean),
        )
        self._revival: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.log_threshold: nn.Parameter | None = None
        if settings.activation == "jumprelu":
            # At the start the scores of normal inputs have this deviation, and k of them lie above the threshold.
            share = torch.tensor(min(settings.k / settings.latents, 0.49))
            threshold = settings.encoder_scale * -torch.special.ndtri(share)
            self.log_threshold = nn.Parameter(threshold.log().expand(settings.latents).clone())
        self.idle: Tensor
        self.log_sparsity: Tensor
        self.excess: Tensor
        self.lowest: Tensor
        self.register_buffer("idle", torch.zeros(settings.latents, dtype=torch.int64))  # tokens since the last firing
        self.register_buffer("log_sparsity", torch.zeros(()))
        self.register_buffer("excess", torch.zeros(()))  # of active latents in the last step, in multiples of k
        self.register_buffer("lowest", torch.zeros(2))  # sum and number

    def loss(self, x: Tensor, y: Tensor | None, world: int) -> Step:
        """Loss of one batch, differentiable, in the units of the normalised activations: `passes`, then `remember`."""
        normal, result = self.passes(x, y)
        self.remember(normal, result, world)
        return result

    def passes(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Step]:
        """Normalised inputs [rows, d_in] and the step on them, its loss differentiable; changes no state.

        The gradient by which dead latents learn is not in it: `before_update` adds it where it is not 0, for by way of
        autograd it would be as large as the weights.

        Parameters
        ----------
        x: [rows, d_in], activations to encode as they are stored.
        y: [rows, d], those to reconstruct; null: x.
        """
        normal: Tensor = (self.source or self.target)(x)
        return normal, self._step(normal, None if y is None else self.target(y))

    def remember(self, x: Tensor, result: Step, world: int) -> None:
        """Note which latents fired, and what dead ones are to learn from the batch.

        Parameters
        ----------
        x: normalised inputs [rows, d_in].
        world: number of devices that share the batch.
        """
        self.idle.add_(len(x) * world).masked_fill_(result.activity > 0, 0)
        if world > 1:
            torch.distributed.all_reduce(self.idle, torch.distributed.ReduceOp.MIN)
        dead = self.dead().nonzero().squeeze(1)
        wanted = len(dead) and self.settings.aux_k_coefficient
        self._revival = self._revive(x, result.error, dead, world) if wanted else None

    def _revive(self, x: Tensor, error: Tensor, dead: Tensor, world: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Some of the dead latents, and the gradients of their encoder rows, decoder rows and encoder biases."""
        # A batch is in the order of the store, which is that of text lengths: take rows from all of it.
        few = slice(None, None, max(1, len(x) * world // _AUX_ROWS))
        some = dead[:: -(-len(dead) // _AUX_LATENTS)]
        rows = [weight[some].detach().requires_grad_() for weight in (self.sae.encoder, self.sae.W_dec, self.sae.b_enc)]
        with torch.enable_grad():
            loss = auxiliary_loss(self.sae.centre(x[few]).detach(), error[few], *rows)
        return some, torch.autograd.grad(self.settings.aux_k_coefficient * loss, rows)

    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens: bool [n]."""
        return self.idle > self.dead_after

    @torch.no_grad()
    def figures(self, y: Tensor, result: Step) -> Tensor:
        """What a step is logged with, float64 [5].

        The loss, the sums of squared errors and of squared deviations from the training mean (both in the units of the
        store), the active latents per row, and the share of dead latents.

        Parameters
        ----------
        y: [rows, d], the activations to reconstruct as they are stored.
        """
        error = self.target.inverse(result.error)
        deviation = y.float() - self.target.mean
        parts = result.loss, error.square().sum(), deviation.square().sum(), result.l0, self.dead().float().mean()
        return torch.stack([part.double() for part in parts])

    def _step(self, x: Tensor, y: Tensor | None) -> Step:
        activation = self.settings.activation
        if activation == "topk" or activation == "batchtopk":
            return sparse_step(self.sae, x, y, select=activation, widths=self.settings.matryoshka or ())
        sparsity = self.log_sparsity.exp() * (1 + _PROPORTIONAL * self.excess)
        if activation == "relu":  # a bonus for large activations would have no bound
            sparsity = sparsity.clamp_min(0.0)
        return dense_step(self.sae, x, y, log_threshold=self.log_threshold, sparsity=sparsity)

    @torch.no_grad()
    def before_update(self, world: int) -> None:
        """Add the gradients of dead latents; take off the decoder's what would change its rows' norms."""
        sae = self.sae
        if self._revival is not None:
            dead, gradients = self._revival
            for weight, gradient in zip((sae.encoder, sae.W_dec, sae.b_enc), gradients, strict=True):
                if world > 1:
                    torch.distributed.all_reduce(gradient)
                    gradient /= world
                assert weight.grad is not None
                add_rows_(weight.grad, dead, gradient)
        assert sae.W_dec.grad is not None
        gradient, W_dec = own(sae.W_dec.grad), own(sae.W_dec)
        if kernels := fused(gradient):
            kernels.take_off_parallel_(gradient, W_dec)
            return
        for first in range(0, len(gradient), _CHUNK):
            g, w = gradient[first : first + _CHUNK], W_dec[first : first + _CHUNK]
            g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)

    @torch.no_grad()
    def after_update(self, result: Step, share: float) -> None:
        """Bring the decoder's rows back to norm 1, and remember what the step tells for later ones.

        Parameters
        ----------
        result: of this step, averaged over the devices.
        share: of the steps that are done.
        """
        W_dec = own(self.sae.W_dec)
        if kernels := fused(W_dec):
            kernels.normalise_(W_dec)
        else:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        if self.settings.activation in ("relu", "jumprelu"):
            self.excess.copy_((result.l0 / self.settings.k - 1).clamp(-1, 1))
            self.log_sparsity.add_(self.excess, alpha=_INTEGRAL / self.steps)
        elif self.settings.activation == "batchtopk" and share > 1 - _SETTLED and bool(result.lowest.isfinite()):
            self.lowest.add_(torch.stack([result.lowest, torch.ones_like(result.lowest)]))

    @torch.no_grad()
    def finished(self) -> SAE:
        """The SAE for activations as they are stored: the normalisation folded into the weights, thresholds set.

        Where the weights are cut into pieces, every device has to call it at the same time.
        """
        sae, source = self.sae, self.source or self.target
        unit = self.target.scale  # activations in the units of the store: unless whitened, decoder rows keep norm 1
        encoder, W_dec = source.fold(whole(sae.encoder)) / unit, self.target.inverse(whole(sae.W_dec)) * unit
        b_enc, b_dec = whole(sae.b_enc) / unit, self.target.inverse(whole(sae.b_dec))
        b_in = None if sae.b_in is None else source.inverse(sae.b_in)
        match self.settings.activation:
            case "topk":
                return SAE(encoder, W_dec, b_enc, b_dec, sae.k, b_in=b_in)
            case "batchtopk":
                threshold = (self.lowest[0] / self.lowest[1].clamp_min(1)).expand(sae.latents)
            case "relu":
                threshold = torch.zeros_like(b_enc)
            case "jumprelu":
                assert self.log_threshold is not None
                threshold = whole(self.log_threshold).exp()
        return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold / unit, b_in=b_in)


class Normal(nn.Module):
    """The normalisation of activations: a factor, or, for those of few effective dimensions, a matrix."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.scale = moments.scale
        forth, back = moments.whitening() or (None, None)
        self.mean: Tensor
        self.forth: Tensor | None
        self.back: Tensor | None
        for name, tensor in (("mean", moments.mean), ("forth", forth), ("back", back)):
            self.register_buffer(name, tensor, persistent=False)  # follows from the data

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., d], to float32."""
        return x.float() * self.scale if self.forth is None else linear(x.float(), self.forth)

    def inverse(self, x: Tensor) -> Tensor:
        """Bring normalised [..., d] back to the units of the store."""
        return x / self.scale if self.back is None else linear(x, self.back)

    def fold(self, encoder: Tensor) -> Tensor:
        """Encoder rows [n, d] for activations that are not normalised."""
        return encoder * self.scale if self.forth is None else linear(encoder, self.forth)


def auxiliary_loss(centred: Tensor, error: Tensor, encoder: Tensor, W_dec: Tensor, b_enc: Tensor) -> Tensor:
    """Mean over rows of the squared error of explaining the residual with dead latents only (Gao et al. 2024, A.2).

    It is in the units of the main loss, as in the paper, whose coefficient is 1/32.

    Parameters
    ----------
    centred: float32 [rows, d_in], inputs without their bias.
    error: [rows, d], y_hat - y of the step, taken as a constant.
    encoder, W_dec, b_enc: [m, d_in], [m, d], [m], the weights of dead latents; at most d / 2 of them, the most active,
        take part in a row.
    """
    scores = centred @ encoder.T + b_enc
    values, place = scores.relu().topk(min(W_dec.shape[1] // 2, len(W_dec)), dim=-1, sorted=False)
    explained = torch.zeros_like(scores).scatter(1, place, values) @ W_dec
    return (explained + error).square().sum() / len(centred)

"""One SAE in training: its weights, its loss, the revival of dead latents, and the state between steps."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from babelscope.activations.moments import Normalisation
from babelscope.config.schema import Train
from babelscope.models.hardware import one_thread
from babelscope.models.matmul import linear
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.training import decoder
from babelscope.sae.training.dense import dense_step
from babelscope.sae.training.sharding import add_rows_, full, local
from babelscope.sae.training.step import Step, sparse_step

# Rows of a step that train dead latents, and the maximum number of dead latents trained: enough to find their
# directions, at a fraction of the step's time and memory.
_AUX_ROWS, _AUX_LATENTS = 256, 8192
# The default of `train.dead_after`, as a multiple of the average number of tokens between two firings of a latent.
_WAITS = 32
# Below this number of columns, MKL divides the sum of a product's rows among the threads, so that the number of threads
# decides how it is rounded (measured for widths from 128 to 4,096).
_NARROW = 16
# PI controller of the sparsity weight: _INTEGRAL is the change of its logarithm over a run per unit of relative L0
# error (L0 / k - 1), _PROPORTIONAL the immediate response.
_INTEGRAL, _PROPORTIONAL = 20.0, 3.0
# BatchTopK's threshold for inference is the smallest activation, averaged over this last share of the steps.
_SETTLED = 0.05


class Learner(nn.Module):
    """An SAE in training on normalised activations, whose mean squared norm is their width.

    Parameters
    ----------
    settings: the `train` section.
    target: normalisation of the activations to reconstruct.
    source: normalisation of the activations to encode (transcoders); None if they are the same.
    steps: number of steps in the run.
    seed: seed of the initialisation.
    """

    def __init__(
        self, settings: Train, target: Normalisation, source: Normalisation | None, *, steps: int, seed: int
    ) -> None:
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
            # If inputs are normally distributed, scores start with the standard deviation encoder_scale, and k of a row
            # exceed this threshold.
            share = torch.tensor(min(settings.k / settings.latents, 0.49))
            threshold = settings.encoder_scale * -torch.special.ndtri(share)
            self.log_threshold = nn.Parameter(threshold.log().expand(settings.latents).clone())
        self.tokens_since_fired: Tensor
        self.log_sparsity: Tensor
        self.l0_error: Tensor
        self.min_activation: Tensor
        self.register_buffer("tokens_since_fired", torch.zeros(settings.latents, dtype=torch.int64))
        self.register_buffer("log_sparsity", torch.zeros(()))
        self.register_buffer("l0_error", torch.zeros(()))  # L0 / k - 1 of the last step
        self.register_buffer("min_activation", torch.zeros(2))  # sum over steps, number of steps

    def loss(self, x: Tensor, y: Tensor | None = None, normal: Tensor | None = None, *, world: int) -> Step:
        """The differentiable loss of one batch, in units of the normalised activations: `passes`, then `remember`."""
        normal, result = self.passes(x, y, normal)
        self.remember(normal, result, world)
        return result

    def passes(self, x: Tensor, y: Tensor | None = None, normal: Tensor | None = None) -> tuple[Tensor, Step]:
        """Normalised inputs [rows, d_in], and the step on them with a differentiable loss; changes no state.

        The loss does not include that of dead latents: `before_update` adds the few rows of their gradient, since
        autograd's gradient would be as large as the weights.

        Parameters
        ----------
        x: [rows, d_in], activations to encode, as stored.
        y: [rows, d], activations to reconstruct, as stored; None: x.
        normal: `x` normalised; None: it is computed.
        """
        inputs: Tensor = (self.source or self.target)(x) if normal is None else normal
        return inputs, self._step(inputs, None if y is None else self.target(y))

    def remember(self, x: Tensor, result: Step, world: int) -> None:
        """Record which latents fired, and the gradients of dead ones on this batch.

        Parameters
        ----------
        x: normalised inputs [rows, d_in].
        world: number of devices that share the batch.
        """
        self.tokens_since_fired.add_(len(x) * world).masked_fill_(result.activity > 0, 0)
        if world > 1:
            torch.distributed.all_reduce(self.tokens_since_fired, torch.distributed.ReduceOp.MIN)
        dead = self.dead().nonzero().squeeze(1)
        wanted = len(dead) and self.settings.aux_k_coefficient
        self._revival = self._revive(x, result.error, dead, world) if wanted else None

    def _revive(self, x: Tensor, error: Tensor, dead: Tensor, world: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Some of the dead latents, and the gradients of their encoder rows, decoder rows and encoder biases."""
        # The sampled rows are spread over the batch, which is in the order of the store, by text length.
        sample = slice(None, None, max(1, len(x) * world // _AUX_ROWS))
        dead = dead[:: -(-len(dead) // _AUX_LATENTS)]
        rows = [weight[dead].detach().requires_grad_() for weight in (self.sae.encoder, self.sae.W_dec, self.sae.b_enc)]
        with torch.enable_grad(), one_thread() if len(dead) < _NARROW else nullcontext():
            loss = auxiliary_loss(self.sae.centre(x[sample]).detach(), error[sample], *rows)
            return dead, torch.autograd.grad(self.settings.aux_k_coefficient * loss, rows)

    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens: bool [n]."""
        return self.tokens_since_fired > self.dead_after

    @torch.no_grad()
    def figures(self, y: Tensor, result: Step) -> Tensor:
        """Figures for the log, float32 [5].

        They are the loss, the sums of squared errors and of squared deviations from the training mean (both in units of
        the store), the mean number of active latents per row, and the share of dead latents.

        Parameters
        ----------
        y: [rows, d], activations to reconstruct, as stored.
        """
        # Sums of rows first, since the number of threads changes how the sum of a whole matrix is rounded.
        error = self.target.inverse(result.error).square().sum(-1).sum()
        deviation = (y.float() - self.target.mean).square().sum(-1).sum()
        parts = result.loss, error, deviation, result.l0, self.dead().float().mean()
        return torch.stack(parts)

    def _step(self, x: Tensor, y: Tensor | None) -> Step:
        activation = self.settings.activation
        if activation == "topk" or activation == "batchtopk":
            return sparse_step(self.sae, x, y, select=activation, widths=self.settings.matryoshka or ())
        sparsity = self.log_sparsity.exp() * (1 + _PROPORTIONAL * self.l0_error)
        if activation == "relu":  # a negative penalty would reward large activations without bound
            sparsity = sparsity.clamp_min(0.0)
        return dense_step(self.sae, x, y, log_threshold=self.log_threshold, sparsity=sparsity)

    @torch.no_grad()
    def before_update(self, world: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add the gradients of dead latents, and project the decoder's gradient so that its rows keep their norms.

        Parameters
        ----------
        world: number of devices that share the batch.
        optimizer: the optimizer of the weights. On a GPU, this method then does the whole update of the decoder with
            that optimizer's state (`decoder.update_`), and the optimizer's step and `after_update` skip the decoder.
            None: the gradient is only projected.
        """
        sae = self.sae
        if self._revival is not None:
            dead, gradients = self._revival
            for weight, gradient in zip((sae.encoder, sae.W_dec, sae.b_enc), gradients, strict=True):
                if world > 1:
                    torch.distributed.all_reduce(gradient)
                    gradient /= world
                assert weight.grad is not None
                add_rows_(weight.grad, dead, gradient)
        frozen = {"decoder": [sae.W_dec], "encoder": [sae.encoder]}.get(self.settings.frozen or "", [])
        for weight in frozen:  # without a gradient ever, Adam never moves them
            assert weight.grad is not None
            weight.grad.zero_()
        assert sae.W_dec.grad is not None
        if optimizer is None or not decoder.update_(sae.W_dec, optimizer):
            decoder.take_off_parallel_(local(sae.W_dec.grad), local(sae.W_dec))

    @torch.no_grad()
    def after_update(self, result: Step, share: float) -> None:
        """Scale the decoder's rows back to norm 1, and update the sparsity weight or threshold.

        Parameters
        ----------
        result: result of this step, averaged over the devices.
        share: share of the steps that are done.
        """
        if self.sae.W_dec.grad is not None:  # `decoder.update_` scales them itself, and deletes the gradient
            decoder.normalise_(local(self.sae.W_dec))
        if self.settings.activation in ("relu", "jumprelu"):
            self.l0_error.copy_((result.l0 / self.settings.k - 1).clamp(-1, 1))
            self.log_sparsity.add_(self.l0_error, alpha=_INTEGRAL / self.steps)
        elif (
            self.settings.activation == "batchtopk" and share > 1 - _SETTLED and bool(result.min_activation.isfinite())
        ):
            self.min_activation.add_(torch.stack([result.min_activation, torch.ones_like(result.min_activation)]))

    @torch.no_grad()
    def finished(self) -> SAE:
        """The SAE for activations as stored, with the normalisation folded into the weights, and with its thresholds.

        With sharded weights, every device must call this at the same time.
        """
        sae, source = self.sae, self.source or self.target
        unit = self.target.scale  # converts latents to units of the store: decoder rows keep norm 1 unless whitened
        encoder, W_dec = source.fold(full(sae.encoder)) / unit, self.target.inverse(full(sae.W_dec)) * unit
        b_enc, b_dec = full(sae.b_enc) / unit, self.target.inverse(full(sae.b_dec))
        b_in = None if sae.b_in is None else source.inverse(sae.b_in)
        match self.settings.activation:
            case "topk":
                return SAE(encoder, W_dec, b_enc, b_dec, sae.k, b_in=b_in)
            case "batchtopk":
                threshold = (self.min_activation[0] / self.min_activation[1].clamp_min(1)).expand(sae.latents)
            case "relu":
                threshold = torch.zeros_like(b_enc)
            case "jumprelu":
                assert self.log_threshold is not None
                threshold = full(self.log_threshold).exp()
        return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold / unit, b_in=b_in)


class Normal(nn.Module):
    """A `Normalisation` as a module; checkpoints hold it separately (`SAETraining.on_save_checkpoint`)."""

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.mean: Tensor
        self.forth: Tensor | None
        self.back: Tensor | None
        mean, self.scale, forth, back = normalisation
        for name, tensor in (("mean", mean), ("forth", forth), ("back", back)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., d], in float32."""
        return x.float() * self.scale if self.forth is None else linear(x.float(), self.forth)

    def inverse(self, x: Tensor) -> Tensor:
        """Convert normalised `x` [..., d] back to the units of the store."""
        return x / self.scale if self.back is None else linear(x, self.back)

    def fold(self, encoder: Tensor) -> Tensor:
        """Convert encoder rows [n, d] for normalised activations to rows for activations as stored."""
        return encoder * self.scale if self.forth is None else linear(encoder, self.forth)


def auxiliary_loss(centred: Tensor, error: Tensor, encoder: Tensor, W_dec: Tensor, b_enc: Tensor) -> Tensor:
    """Mean over rows of the squared error of reconstructing -`error` from dead latents alone (Gao et al. 2024, A.2).

    It is in the units of the main loss, as in the paper, which weights it by 1/32.

    Parameters
    ----------
    centred: float32 [rows, d_in], inputs minus their bias.
    error: [rows, d], y_hat - y of the step, a constant.
    encoder, W_dec, b_enc: [m, d_in], [m, d], [m], weights of dead latents; each row uses the most active d / 2 of them.
    """
    scores = centred @ encoder.T + b_enc
    values, indices = scores.relu().topk(min(W_dec.shape[1] // 2, len(W_dec)), dim=-1, sorted=False)
    explained = torch.zeros_like(scores).scatter(1, indices, values) @ W_dec
    return (explained + error).square().sum() / len(centred)

"""A learner's forward and backward pass as one CUDA graph, since launches take most of the time of a small step."""

import torch
from torch import Tensor

from babelscope.sae.kernels import fused
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.step import Step

# Runs before the recording, to compile kernels and allocate the libraries' workspaces.
_WARMUP = 3


class Graph:
    """The forward and backward pass of one learner, recorded with a first batch and replayed with others of its shape.

    A replay runs the same kernels as the learner's own passes, so it gives the same bits.

    Parameters
    ----------
    learner: a learner for which `suits` returns True.
    x, y: the first batch, as for `Learner.loss`.
    """

    def __init__(self, learner: Learner, x: Tensor, y: Tensor | None) -> None:
        self.weights = [weight for weight in learner.parameters() if weight.requires_grad]
        self.x, self.y = x.clone(), None if y is None else y.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                learner.passes(self.x, self.y)[1].loss.backward()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().wait_stream(side)
        for weight in self.weights:
            weight.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.normal, step = learner.passes(self.x, self.y)
            step.loss.backward()  # type: ignore[no-untyped-call]
        self.step = Step(*(part.detach() for part in step))
        self.gradients = [weight.grad for weight in self.weights]

    @staticmethod
    def suits(learner: Learner, x: Tensor) -> bool:
        """Whether the passes have fixed shapes and never synchronise with the device: TopK with the fused kernels."""
        settings = learner.settings
        return settings.activation == "topk" and not settings.matryoshka and fused(x) is not None

    def fits(self, x: Tensor) -> bool:
        """Whether `x` has the shape and dtype of the first batch."""
        return x.shape == self.x.shape and x.dtype == self.x.dtype

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Step]:
        """Set the gradients of the weights, and return the result of `Learner.passes` (valid until the next call)."""
        self.x.copy_(x)
        if self.y is not None and y is not None:
            self.y.copy_(y)
        self.graph.replay()
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        return self.normal, self.step

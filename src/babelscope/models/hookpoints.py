"""Hookpoints: reading and changing activations by name. The only module that knows PyTorch hooks.

A hookpoint is the path of a module inside the model, without the model's own prefix: `layers.14.mlp` is the output of
the MLP of block 14, `layers.14` the residual stream after it, `layers.14.mlp.act_fn` its neurons.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from babelscope.core.errors import UserError, nearest
from babelscope.models.names import INPUT as INPUT
from babelscope.models.names import layer_of as layer_of

log = logging.getLogger(__name__)

Edit = Callable[[Tensor], Tensor]


def resolve(model: Any, hookpoints: Sequence[str], key: str = "hookpoints") -> dict[str, nn.Module]:
    """The module behind each hookpoint; `key` is where params.yaml names them.

    Raises
    ------
    UserError: a hookpoint that the model does not have in its blocks (the message names the nearest that it has), or
        whose name gives another number than that of its block.
    """
    body = getattr(model, "base_model", model)
    modules = dict(body.named_modules())
    modules.pop("", None)
    for name in hookpoints:
        if name not in modules:
            raise UserError(f"params.yaml: {key}: the model has no {name!r}; {nearest(name, modules)}")
    # A module that several blocks share lies in each of them.
    inside: dict[int, set[int]] = {}
    for number, block in enumerate(blocks(model)):
        for module in block.modules():
            inside.setdefault(id(module), set()).add(number)
    for name in hookpoints:
        numbers = inside.get(id(modules[name]), set())
        if not numbers:
            allowed = nearest(name, (key for key, module in modules.items() if id(module) in inside))
            raise UserError(f"params.yaml: {key}: {name!r} lies outside the model's blocks; {allowed}")
        if layer_of(name) not in numbers:
            raise UserError(
                f"params.yaml: {key}: {name!r} lies in block {min(numbers)} of the model, but the first number of its "
                f"path is {layer_of(name)}; allowed: modules of blocks whose path has the block's number first"
            )
    return {name: modules[name] for name in hookpoints}


def _first(output: Any) -> Tensor:
    """The activations in a module's output: blocks and attentions of some families return tuples or lists."""
    activations: Tensor = output[0] if isinstance(output, tuple | list) else output
    return activations


def _with_first(output: Any, changed: Tensor) -> Any:
    if not isinstance(output, tuple | list):
        return changed
    return [changed, *output[1:]] if isinstance(output, list) else (changed, *output[1:])


class _DeepestReached(Exception):
    """Ends a forward pass once every hookpoint has been read."""


@contextmanager
def editing(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """While open, the activations at each hookpoint are replaced by `edit(activations)`, shape `[batch, tokens, d]`.

    Some families (OPT) run their MLP over all tokens in one row, `[batch * tokens, d]`: an edit sees them by text.
    """
    shape: list[torch.Size] = []

    def note(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shape[:] = [(kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape]

    with ExitStack() as stack:
        body = getattr(model, "base_model", model)
        stack.callback(body.register_forward_pre_hook(note, with_kwargs=True).remove)
        for name, module in resolve(model, list(edits)).items():

            def hook(_module: nn.Module, _inputs: Any, output: Any, edit: Edit = edits[name]) -> Any:
                activations = _first(output)
                if activations.dim() == 2 and len(activations) == shape[0].numel():
                    changed = edit(activations.view(*shape[0], -1)).reshape(activations.shape)
                else:
                    changed = edit(activations)
                return _with_first(output, changed)

            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def read(model: Any, hookpoints: Sequence[str], **inputs: Any) -> dict[str, Tensor]:
    """One forward pass as far as the deepest hookpoint.

    Parameters
    ----------
    model: a causal language model.
    hookpoints: names; the pass ends as soon as all of them have been read. A name with the suffix `.input` is what goes
        into the hookpoint's module (its first tensor) instead of what comes out (transcoders encode it).
    inputs: what the model's forward takes (`input_ids`, `attention_mask`).

    Returns
    -------
    The activations `[batch, tokens, d]` by hookpoint, in the model's dtype.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(activations: Tensor) -> Tensor:
            seen[name] = activations.clone()  # some blocks go on to change their parts' outputs in place
            if len(seen) == len(hookpoints):
                raise _DeepestReached
            return activations

        return edit

    body = getattr(model, "base_model", model)
    outputs = {name: keep(name) for name in hookpoints if not name.endswith(INPUT)}
    with _watching_inputs(model, {n: keep(n) for n in hookpoints if n.endswith(INPUT)}), editing(model, outputs):
        try:
            body(**inputs, use_cache=False)
        except _DeepestReached:
            return seen
    missing = sorted(set(hookpoints) - set(seen))
    raise UserError(f"params.yaml: hookpoints: the forward pass never reaches {', '.join(missing)}")


def reads_ahead(model: Any) -> bool:
    """Whether what the model computes at a token depends on later tokens, as in masked language models.

    The derivative of the outputs at all tokens but the last by the embedding of the last one: in a causal model no path
    leads there, so that it is 0 in any precision. Two passes over texts that differ in the last token would show it,
    too, but there a tolerance must tell a weak dependence from rounding, which is as large in bfloat16: a mixture of
    experts multiplies other shapes where the last token goes to another expert, and one of limited capacity may turn
    away another token. Neither has a derivative. What remains are convolutions by Fourier transform, exact to rounding
    in float32: hence 1e-4 of the derivative by the tokens' own embeddings.

    A model whose code has no derivatives (kernels for inference only) counts as causal.
    """
    # Tokens from the middle of the vocabulary: padding and the like are at its ends.
    count = model.config.get_text_config().vocab_size
    ids = torch.arange(count // 2 - 2, count // 2 + 2, device=device_of(model)).clamp(0, count - 1).unsqueeze(0)
    embedded: list[Tensor] = []

    def start_here(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may change in place

    handle = model.get_input_embeddings().register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            body = getattr(model, "base_model", model)
            seen = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            # Not their sum, which a layer norm keeps constant.
            weights = torch.arange(seen.shape[-1], device=seen.device).sin()
            (gradient,) = torch.autograd.grad((seen[:, :-1].float() * weights).sum(), embedded[0])
    except (RuntimeError, IndexError) as error:
        log.warning("%s: whether it is causal cannot be checked: %.200s", type(model).__name__, error)
        return False
    finally:
        handle.remove()
    by_token = (
        gradient.float().reshape(ids.shape[1], -1).norm(dim=1)
    )  # some models put the tokens first, then the texts
    return bool(by_token[-1] > 1e-4 * by_token[:-1].max())


def calls(model: Any, hookpoints: Sequence[str], ids: Tensor) -> dict[str, int]:
    """How often one forward pass over `ids` (int64 `[batch, tokens]`) runs the module of each hookpoint."""
    found: Counter[str] = Counter()

    def note(name: str) -> Edit:
        def edit(activations: Tensor) -> Tensor:
            found[name] += 1
            return activations

        return edit

    with editing(model, {name: note(name) for name in hookpoints}):
        getattr(model, "base_model", model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return {name: found[name] for name in hookpoints}


def width(model: Any, hookpoint: str) -> int:
    """The number of dimensions of the activations at `hookpoint`."""
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device_of(model))
    return read(model, [hookpoint], input_ids=ids)[hookpoint].shape[-1]


def blocks(model: Any) -> nn.ModuleList:
    """The model's list of transformer blocks, in order of execution.

    Raises
    ------
    UserError: the model has no list with as many modules as its configuration says it has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in getattr(model, "base_model", model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"params.yaml: model.name: found no list of {count} transformer blocks in {type(model).__name__}")


def shard_blocks(model: Any, mesh: Any) -> None:
    """Cut the weights of the blocks among the devices of `mesh` (FSDP): a block's are whole while it is computed.

    What is outside the blocks (embeddings, the last norm, the head) stays whole on every device.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


@contextmanager
def block_inputs(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass leaves the residual stream `[batch, tokens, d]` before each of `layers` here."""
    seen: dict[int, Tensor] = {}
    stack_of_blocks = blocks(model)
    with ExitStack() as stack:
        for layer in layers:

            def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer) -> None:
                seen[layer] = args[0] if args else kwargs["hidden_states"]

            handle = stack_of_blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for block in stack_of_blocks:
            stack.callback(block.register_forward_hook(_note_form).remove)
        yield seen


def _note_form(block: nn.Module, _inputs: Any, output: Any) -> None:
    """Remember in which form a block returns its result, for the one that may stand in for it."""
    block.__dict__["_form"] = [None] * len(output) if isinstance(output, tuple | list) else None


def _learn_forms(model: Any) -> None:
    """Run one token through the model if no pass has shown yet in which form its blocks return their results."""
    unknown = [block for block in blocks(model) if "_form" not in block.__dict__]
    if unknown:
        with ExitStack() as stack:
            for block in unknown:
                stack.callback(block.register_forward_hook(_note_form).remove)
            ids = torch.zeros((1, 1), dtype=torch.int64, device=device_of(model))
            getattr(model, "base_model", model)(input_ids=ids, use_cache=False)


class _Skipped(nn.Module):
    """Stands in for a block whose result is known: hands its input on in the form that the family's blocks return."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Some families read attributes of the block (e.g. `attention_type`) in the loop over the blocks.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        form = self.__dict__["_block"].__dict__["_form"]
        return hidden_states if form is None else (hidden_states, *form[1:])


@contextmanager
def starting_at(model: Any, layer: int, hidden: Tensor | None) -> Iterator[None]:
    """While open, a forward pass starts before block `layer` with the residual stream `hidden` `[batch, tokens, d]`.

    The blocks below are skipped, not computed: only embedding, positions and mask are. The result is bit for bit that
    of the whole pass if `hidden` is what `block_inputs` read in a pass of the same batch; `probing.can_restart` says
    whether a model allows for it. With `layer` the number of blocks, all of them are skipped and only what follows is
    computed. Without `hidden` nothing is skipped.
    """
    if hidden is None:
        yield
        return
    _learn_forms(model)
    stack_of_blocks = blocks(model)
    originals = list(stack_of_blocks[:layer])

    def inject(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for number, block in enumerate(originals):
            stack_of_blocks[number] = _Skipped(block)
            stack.callback(stack_of_blocks.__setitem__, number, block)
        entry = stack_of_blocks[min(layer, len(stack_of_blocks) - 1)]
        stack.callback(entry.register_forward_pre_hook(inject, with_kwargs=True).remove)
        yield


def run_blocks(model: Any, layers: range, hidden: Tensor | None, **inputs: Any) -> Tensor:
    """The residual stream `[batch, tokens, d]` after the blocks `layers`, which are the only ones computed.

    Parameters
    ----------
    model: a causal language model.
    layers: consecutive, at least one.
    hidden: the residual stream before them, `[batch, tokens, d]`; null: the embeddings (`layers` starts at 0).
    inputs: what the model's forward takes (`input_ids`, `position_ids`); `input_ids` has the shape of `hidden`.
    """
    after: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        after.append(_first(output))
        raise _DeepestReached

    with ExitStack() as stack:
        stack.callback(blocks(model)[layers[-1]].register_forward_hook(stop).remove)
        stack.enter_context(starting_at(model, layers[0], hidden))
        try:
            getattr(model, "base_model", model)(**inputs, use_cache=False)
        except _DeepestReached:
            return after[0]
    raise UserError(f"params.yaml: model.name: {type(model).__name__} never runs its block {layers[-1]}")


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` from the residual stream after the last block, `[tokens, d]`."""
    # Each a text of its own: a model may have fewer positions than there are tokens.
    ids = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
    with starting_at(model, len(blocks(model)), hidden.unsqueeze(1)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
    return logits


def device_of(model: Any) -> torch.device:
    """The device of the model's first parameter."""
    device: torch.device = next(model.parameters()).device
    return device


@contextmanager
def _watching_inputs(model: Any, watchers: Mapping[str, Edit]) -> Iterator[None]:
    """While open, the first tensor that enters the module of each `<hookpoint>.input` is shown to its watcher."""
    with ExitStack() as stack:
        for name, module in resolve(model, [name.removesuffix(INPUT) for name in watchers]).items():

            def hook(
                _module: nn.Module, args: Any, kwargs: dict[str, Any], watch: Edit = watchers[name + INPUT]
            ) -> None:
                watch(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def inputs_of(model: Any, hookpoints: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves what enters the module of each hookpoint here, `[batch, tokens, d_in]`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(activations: Tensor) -> Tensor:
            seen[name] = activations
            return activations

        return edit

    with _watching_inputs(model, {name + INPUT: keep(name) for name in hookpoints}):
        yield seen

"""Hookpoints: reading and changing activations by name with PyTorch's hooks.

A hookpoint is the path of a module inside the model, without the model's own prefix: `layers.14.mlp` is the output of
the MLP of block 14, `layers.14` the residual stream after the block, `layers.14.mlp.act_fn` the MLP's neurons. The
suffix `.input` means the module's input: `layers.14.self_attn.o_proj.input` are the outputs of the attention heads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from babelscope.core.errors import UserError, nearest
from babelscope.models.names import input_name, module_of
from babelscope.models.names import layer_of as layer_of

Edit = Callable[[Tensor], Tensor]


def resolve(model: Any, hookpoints: Sequence[str], key: str = "hookpoints") -> dict[str, nn.Module]:
    """The module of each hookpoint; `key` is the key of the hookpoints in params.yaml.

    Raises
    ------
    UserError: a hookpoint is not in the model's blocks (the message names the nearest one), or the number in its name
        is not that of its block.
    """
    modules = dict(body_of(model).named_modules())
    modules.pop("", None)
    paths = {name: module_of(name)[0] for name in hookpoints}
    for path in paths.values():
        if path not in modules:
            raise UserError(f"params.yaml: {key}: the model has no {path!r}; {nearest(path, modules)}")
    # Several blocks may share a module.
    inside: dict[int, set[int]] = {}
    for number, block in enumerate(blocks(model)):
        for module in block.modules():
            inside.setdefault(id(module), set()).add(number)
    for name in hookpoints:
        numbers = inside.get(id(modules[paths[name]]), set())
        if not numbers:
            allowed = nearest(name, (key for key, module in modules.items() if id(module) in inside))
            raise UserError(f"params.yaml: {key}: {name!r} lies outside the model's blocks; {allowed}")
        if layer_of(name) not in numbers:
            raise UserError(
                f"params.yaml: {key}: {name!r} lies in block {min(numbers)} of the model, but the first number of its "
                f"path is {layer_of(name)}; allowed: modules of blocks whose path has the block's number first"
            )
    return {name: modules[path] for name, path in paths.items()}


# By model, the modules that were resolved: passes over parts of texts need the same few hundreds of times.
_resolved: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def _modules(model: Any, hookpoints: Sequence[str]) -> dict[str, nn.Module]:
    """`resolve`, whose search is done once for modules that are still in their places."""
    known, body = _resolved.setdefault(model, {}), body_of(model)
    with suppress(AttributeError):  # there is no such module: `resolve` says so
        if all(known.get(name) is body.get_submodule(module_of(name)[0]) for name in hookpoints):
            return {name: known[name] for name in hookpoints}
    known |= (found := resolve(model, hookpoints))
    return found


def body_of(model: Any) -> Any:
    """The model without its unembedding."""
    return getattr(model, "base_model", model)


def _first(output: Any) -> Tensor:
    """The activations in a module's output, since blocks and attentions of some families return tuples or lists."""
    activations: Tensor = output[0] if isinstance(output, tuple | list) else output
    return activations


def _with_first(output: Any, changed: Tensor) -> Any:
    if not isinstance(output, tuple | list):
        return changed
    return [changed, *output[1:]] if isinstance(output, list) else (changed, *output[1:])


class _DeepestReached(Exception):
    """Ends a forward pass early."""


@contextmanager
def editing(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """While open, the activations `[batch, tokens, d]` at each hookpoint are replaced by `edit(activations)`.

    Edits also get and return this shape in families (OPT) that run their MLP on `[batch * tokens, d]`.
    """
    shape: list[torch.Size] = []

    def note(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shape[:] = [(kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape]

    with ExitStack() as stack:
        stack.callback(body_of(model).register_forward_pre_hook(note, with_kwargs=True).remove)
        for name, module in _modules(model, list(edits)).items():

            def changed(activations: Tensor, edit: Edit = edits[name]) -> Tensor:
                if activations.dim() == 2 and len(activations) == shape[0].numel():
                    return edit(activations.view(*shape[0], -1)).reshape(activations.shape)
                return edit(activations)

            def after(_module: nn.Module, _inputs: Any, output: Any, changed: Edit = changed) -> Any:
                return _with_first(output, changed(_first(output)))

            def before(_module: nn.Module, args: Any, kwargs: dict[str, Any], changed: Edit = changed) -> Any:
                key = _entering(args, kwargs)
                if isinstance(key, int):
                    return (*args[:key], changed(args[key]), *args[key + 1 :]), kwargs
                return args, kwargs | {key: changed(kwargs[key])}

            if module_of(name)[1]:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(after).remove)
        yield


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """The position or the name of a module's first argument that is a tensor."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next(key for key, value in named if isinstance(value, Tensor))


def read(model: Any, hookpoints: Sequence[str], **inputs: Any) -> dict[str, Tensor]:
    """Read activations in one forward pass, which ends after the deepest hookpoint.

    Parameters
    ----------
    model: a causal language model.
    hookpoints: names of hookpoints, and of what transcoders encode there (`names.input_name`).
    inputs: arguments of the model's forward (`input_ids`, `attention_mask`).

    Returns
    -------
    The activations `[batch, tokens, d]` by hookpoint, in the model's dtype.
    """
    seen: dict[str, Tensor] = {}

    def keep(activations: Tensor, name: str) -> Tensor:
        seen[name] = activations.clone()  # some blocks later change their modules' outputs in place
        if len(seen) == len(hookpoints):
            raise _DeepestReached
        return activations

    with editing(model, {name: partial(keep, name=name) for name in hookpoints}):
        try:
            body_of(model)(**({"use_cache": False} | inputs))
        except _DeepestReached:
            return seen
    missing = sorted(set(hookpoints) - set(seen))
    raise UserError(f"params.yaml: hookpoints: the forward pass never reaches {', '.join(missing)}; remove them")


def calls(model: Any, hookpoints: Sequence[str], ids: Tensor) -> dict[str, int]:
    """How many times one forward pass over `ids` (int64 `[batch, tokens]`) runs the module of each hookpoint."""
    found = dict.fromkeys(hookpoints, 0)

    def count(activations: Tensor, name: str) -> Tensor:
        found[name] += 1
        return activations

    with editing(model, {name: partial(count, name=name) for name in hookpoints}):
        body_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return found


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
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"params.yaml: model.name: found no list of {count} transformer blocks in {type(model).__name__}")


def shard_blocks(model: Any, mesh: Any) -> None:
    """Shard the weights of each block over the devices of `mesh` (FSDP); they are gathered while the block computes.

    The modules outside the blocks (embeddings, the last norm, the head) stay whole on every device.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


@contextmanager
def block_inputs(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, the yielded dict holds the last pass's residual stream before `layers`, `[batch, tokens, d]` each."""
    seen: dict[int, Tensor] = {}
    stack_of_blocks = blocks(model)
    with ExitStack() as stack:
        for layer in layers:

            def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer) -> None:
                seen[layer] = args[0] if args else kwargs["hidden_states"]

            stack.callback(stack_of_blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        for block in stack_of_blocks:
            stack.callback(block.register_forward_hook(_note_form).remove)
        yield seen


def _note_form(block: nn.Module, _inputs: Any, output: Any) -> None:
    """Record whether a block returns a tuple, for the module that may replace it (`_Skipped`)."""
    block.__dict__["_form"] = [None] * len(output) if isinstance(output, tuple | list) else None


def _learn_forms(model: Any) -> None:
    """Run one token through the model unless `_note_form` has seen all of its blocks."""
    if any("_form" not in block.__dict__ for block in blocks(model)):
        with block_inputs(model, []):
            body_of(model)(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device_of(model)), use_cache=False)


class _Skipped(nn.Module):
    """Replaces a block whose result is known: returns its input in the form that the block would return."""

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

    The blocks below are skipped; embedding, positions and mask are computed. The result has the same bits as a whole
    pass if `hidden` comes from `block_inputs` in a pass over the same batch; `probing.can_restart` tells whether a
    model supports this. If `layer` is the number of blocks, only the modules after the blocks are computed. If `hidden`
    is None, nothing is skipped.
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
    """Compute the blocks `layers` only, and return the residual stream `[batch, tokens, d]` after them.

    Parameters
    ----------
    model: a causal language model.
    layers: consecutive blocks, at least one.
    hidden: the residual stream before them, `[batch, tokens, d]`; None: the embeddings (`layers` starts at 0).
    inputs: arguments of the model's forward (`input_ids`, `position_ids`); `input_ids` is `[batch, tokens]`. Without
        `use_cache`, no keys and values are kept.
    """
    after: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        after.append(_first(output))
        raise _DeepestReached

    with ExitStack() as stack:
        stack.callback(blocks(model)[layers[-1]].register_forward_hook(stop).remove)
        stack.enter_context(starting_at(model, layers[0], hidden))
        try:
            body_of(model)(**({"use_cache": False} | inputs))
        except _DeepestReached:
            return after[0]
    raise UserError(f"params.yaml: model.name: {type(model).__name__} never runs its block {layers[-1]}")


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` from the residual stream after the last block, `[tokens, d]`."""
    # Each token is a text of its own, since a model may have fewer positions than there are tokens.
    ids = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
    with starting_at(model, len(blocks(model)), hidden.unsqueeze(1)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
    return logits


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


@contextmanager
def inputs_of(model: Any, hookpoints: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, the yielded dict holds what transcoders encode at the hookpoints in the last pass.

    They are `[batch, tokens, d_in]`, by hookpoint.
    """
    seen: dict[str, Tensor] = {}

    def keep(activations: Tensor, name: str) -> Tensor:
        seen[name] = activations
        return activations

    with editing(model, {input_name(name, True): partial(keep, name=name) for name in hookpoints}):
        yield seen

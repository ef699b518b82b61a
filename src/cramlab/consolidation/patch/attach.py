"""Putting patches at attention and taking them off: weights stay untouched, and a closed patch changes no bit."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from cramlab.consolidation.patch.calls import Installation, begin, closed_here, correct, end, enter, leave
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.consolidation.patch.originals import NAMES
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import AttentionSite, base_model


def attach(
    model: nn.Module,
    layers: Mapping[int, FarReads],
    sites: Mapping[int, AttentionSite],
    write: Callable[[nn.Module, Path], None] | None = None,
) -> None:
    """Puts patches at sites, both by index of the block, without checks; `install` is what makes them."""
    changed = cast(PreTrainedModel, model)
    implementation = cast(str, changed.config._attn_implementation)
    for i, layer in layers.items():
        _attach(layer, sites[i])
    base = base_model(model)
    handles = [
        base.register_forward_pre_hook(begin, with_kwargs=True),
        base.register_forward_hook(end, always_call=True),
    ]
    first = min(layers)
    place = int(getattr(sites[first].attention, "layer_idx", first) or 0)
    made = Installation(implementation, handles, layers[first], sites[first].n_heads, place, write)
    setattr(base, Installation.ATTRIBUTE, made)
    for name, method in _OVERRIDDEN.items():
        setattr(model, name, functools.partial(method, model))
    changed.set_attn_implementation(NAMES[implementation])


def _attach(layer: FarReads, site: AttentionSite) -> None:
    site.attention.add_module(FarReads.CHILD, layer)
    layer.handles = [
        site.attention.register_forward_pre_hook(enter, with_kwargs=True),
        site.out_proj.register_forward_hook(correct),
        site.attention.register_forward_hook(leave, always_call=True),
    ]


def installed(model: nn.Module) -> dict[str, FarReads]:
    """The patches of a model, by the name of their attention module."""
    return {
        name.removesuffix(f".{FarReads.CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, FarReads) and name.rpartition(".")[2] == FarReads.CHILD
    }


def installation(model: nn.Module) -> Installation | None:
    """What `install` has changed; None for a model without a patch."""
    found = (vars(module).get(Installation.ATTRIBUTE) for module in model.modules())
    return next((one for one in found if one is not None), None)


def remove(model: nn.Module) -> None:
    """Removes all patches; a model without patches is left as it is."""
    made = installation(model)
    if made is None:
        return
    for name, layer in installed(model).items():
        for handle in layer.handles:
            handle.remove()
        layer.handles = []
        delattr(model.get_submodule(name), FarReads.CHILD)
    for handle in made.handles:
        handle.remove()
    for module in model.modules():
        vars(module).pop(Installation.ATTRIBUTE, None)
        for name in _OVERRIDDEN:
            if isinstance(vars(module).get(name), functools.partial):
                del vars(module)[name]
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))  # where it is wrapped
    inner.set_attn_implementation(made.implementation)


@contextlib.contextmanager
def closed(model: nn.Module) -> Iterator[None]:
    """While open, the model is bit for bit the original in the thread that opened it; other threads see the patches."""
    token = closed_here.set(closed_here.get() | frozenset(installed(model).values()))
    try:
        yield
    finally:
        closed_here.reset(token)


def _save_pretrained(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a patched model: saves the original and the consolidation, and says how to load both."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)  # type: ignore[operator]
    made = installation(model)
    writes = args[0] if args else kwargs.get("is_main_process", True)
    if made is None or not writes:  # removed from the wrapped model; or another process writes
        return
    said = "without the patch, which has no record and so cannot be saved"
    if made.write is not None:
        try:
            made.write(model, Path(save_directory))
        except ConsolidationError as error:
            warnings.warn(f"{save_directory} holds the model without the patch: {error}", stacklevel=2)
            return
        said = (
            "and its consolidation; from_pretrained alone gives the original. To load both:\n"
            f"model = {type(model).__name__}.from_pretrained({str(save_directory)!r})\n"
            f"cramlab.load_consolidated(model, {str(save_directory)!r})"
        )
    warnings.warn(f"{save_directory} holds the model {said}", stacklevel=2)


def _uncompiled(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """`get_compiled_call` of a patched model: `generate` must not compile a model whose rules decide on the host."""
    return model


_OVERRIDDEN = {"save_pretrained": _save_pretrained, "get_compiled_call": _uncompiled}  # methods of a patched model

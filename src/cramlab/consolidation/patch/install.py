"""Installing patches in a model and removing them: weights stay untouched, and a closed patch changes no bit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from cramlab.consolidation.patch.calls import NAMES, Installation, begin, closed_here, correct, end, enter, leave
from cramlab.consolidation.patch.far_reads import FarReads
from cramlab.errors import ConsolidationError
from cramlab.hf.attention_sites import AttentionSite, UnknownFamilyError, attention_sites, base_model, family_of


def consolidatable_sites(model: nn.Module) -> list[AttentionSite]:
    """The attention sub-layers whose far reads can be skipped: those not limited to a sliding window already.

    Raises:
        UnknownFamilyError: when the attention of the model cannot be found.
        ConsolidationError: when its attention cannot be patched.
    """
    if not family_of(model).causal:
        raise ConsolidationError(f"{type(model).__name__} is not a causal language model; give a causal one")
    if not isinstance(model, PreTrainedModel) and any(isinstance(m, PreTrainedModel) for m in model.modules()):
        raise ConsolidationError(
            f"{type(model).__name__} wraps a model of transformers; give the wrapped model (peft: get_base_model())"
        )
    sites = attention_sites(model)
    if not isinstance(model, PreTrainedModel) or not all(_asks_the_interface(site.attention) for site in sites):
        raise UnknownFamilyError(
            f"{type(model).__name__} does not look up its attention in transformers' AttentionInterface, so it cannot "
            "be patched; a family that does needs one Family(...) in FAMILIES in cramlab/hf/attention_sites.py"
        )
    if not getattr(model.config, "is_causal", True) or not all(getattr(s.attention, "is_causal", True) for s in sites):
        raise ConsolidationError(
            f"this {type(model).__name__} lets tokens see later ones; give a causal language model"
        )
    far = [site for site in sites if not _is_windowed(model.config, site.layer)]
    if not far:
        raise ConsolidationError(
            f"every layer of this {model.config.model_type} attends to a sliding window of "
            f"{model.config.sliding_window} tokens only, so there are no far reads to skip"
        )
    return far


def _asks_the_interface(attention: nn.Module) -> bool:
    """Whether the forward pass of a module looks up its attention function in transformers' AttentionInterface."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def _is_windowed(config: Any, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any(kind in types[layer] for kind in ("sliding", "chunked", "local"))
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def install(
    model: nn.Module,
    layers: Mapping[int, FarReads],
    write: Callable[[nn.Module, Path], None] | None = None,
) -> None:
    """Installs patches; from then on new tokens are written into the cache in place.

    Args:
        model: a causal language model of transformers, with "sdpa" or "eager" attention.
        layers: patches by index of the block; a patch can be installed in one model at a time.
        write: see `Installation`.

    Raises:
        ConsolidationError: when the model is patched already, uses other attention, or has no such site.
        UnknownFamilyError: when the attention of the model cannot be found.
    """
    sites = {site.layer: site for site in consolidatable_sites(model)}
    changed = cast(PreTrainedModel, model)
    implementation = changed.config._attn_implementation
    if implementation in NAMES.values() or installed(model):
        raise ConsolidationError("the model is patched already; remove(model) first")
    if implementation not in NAMES:
        raise ConsolidationError(
            f'the model uses "{implementation}" attention, which cannot be patched; load it with '
            'attn_implementation="sdpa" or "eager"'
        )
    if not layers:
        raise ConsolidationError("layers = {}: no layer to patch is given; give at least one")
    if unknown := layers.keys() - sites.keys():
        raise ConsolidationError(f"layers {sorted(unknown)} have no far reads to skip; the model has {sorted(sites)}")
    if taken := [i for i, layer in layers.items() if layer.attached]:
        raise ConsolidationError(f"the patches of layers {taken} are installed in a model; remove them first")
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


@contextlib.contextmanager
def patched(model: nn.Module, layers: Mapping[int, FarReads]) -> Iterator[None]:
    """While open, these patches are installed; see `install`."""
    install(model, layers)
    try:
        yield
    finally:
        remove(model)


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

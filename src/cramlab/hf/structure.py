"""Finding the attention of a model by its structure: one pass over a few tokens shows what each module does.

No family is listed. An attention module is one whose forward pass looks up transformers' AttentionInterface; in a model
without any, one that is named attention and holds at least two affine maps. Its input, the normalisation that made this
input, and the output projection follow from which tensor goes where. Source: ours.
"""

from __future__ import annotations

import inspect
import itertools
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cramlab.errors import UsageError

_N_TOKENS = 6  # tokens of the pass
_NAMED = "attention|attn"  # in the name of a class of attention


class UnknownFamilyError(UsageError, ValueError):
    """The attention of a model cannot be found; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where one attention sub-layer stands: names of modules, from the model's root.

    Attributes:
        layer: index of the block in the list of blocks, from 0.
        block: the block.
        norm: the module whose output is the input of attention; None: there is none within the block.
        attention: the attention module.
        out_proj: the affine map from the heads' outputs, side by side, to the sub-layer's output.
    """

    layer: int
    block: str
    norm: str | None
    attention: str
    out_proj: str

    def names(self) -> Iterator[str]:
        """All names."""
        return (name for name in (self.block, self.norm, self.attention, self.out_proj) if name is not None)


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Attributes:
        name: name of the module.
        module: the module.
        begun: number of the event at which it began.
        given: its first tensor, (B, T, D).
        by_position: whether `given` was its first positional argument.
        returned: the first tensor that it returned.
        ended: number of the event at which it ended.
    """

    name: str
    module: nn.Module
    begun: int
    given: Tensor | None
    by_position: bool
    returned: Tensor | None = None
    ended: int = field(default=-1)

    def holds(self, other: _Call) -> bool:
        """Whether the other call was made within this one, by a module within this one."""
        return other.name.startswith(f"{self.name}.") and self.begun < other.begun and other.ended < self.ended


def asks_the_interface(module: nn.Module) -> bool:
    """Whether the forward pass of a module looks up its attention function in transformers' AttentionInterface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where there is none."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if base is None:  # Llama 4's text model has another prefix than its attribute
        base = next((child for child in model.children() if hasattr(child, "base_model_prefix")), model)
    return cast(nn.Module, base)


def text_config(model: nn.Module) -> Any:
    """The config of a model's language part; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is made to predict the next token: its config does not deny it, or its attention is causal."""
    if getattr(text_config(model), "is_decoder", True) is not False:
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of a model without its head, without a cache, from tokens (B, T)."""
    options = {"use_cache": False} if is_decoder(model) else {}
    return base_model(model)(input_ids=tokens, **options)[0]


def some_tokens(model: nn.Module, n_tokens: int) -> Tensor:
    """Tokens (1, T) that a model can take, on its device."""
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int):
        raise UnknownFamilyError(
            f"{type(model).__name__} has no config.vocab_size, so it is no language model; give a model of transformers"
        )
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return (torch.arange(2, 2 + n_tokens, device=device) % size)[None]


_known: weakref.WeakKeyDictionary[nn.Module, tuple[list[Paths], list[tuple[str, weakref.ref[nn.Module]]]]] = (
    weakref.WeakKeyDictionary()
)


def found(model: nn.Module) -> list[Paths]:
    """The attention sub-layers of a model by block; those of a model that was seen before are not sought again.

    Raises:
        UnknownFamilyError: when none is found, or when no patch or hook could be put at them.
    """
    if model in _known:
        paths, modules = _known[model]
        if all(_get(model, name) is module() for name, module in modules):
            return paths
    paths = _found(model)
    names = {name for one in paths for name in one.names()}
    _known[model] = paths, [(name, weakref.ref(model.get_submodule(name))) for name in names]
    return paths


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _found(model: nn.Module) -> list[Paths]:
    calls = _calls(model)
    kind = type(model).__name__
    attention = [call for call in calls if asks_the_interface(call.module)] or [c for c in calls if _looks_like(c)]
    if not attention or not isinstance(getattr(text_config(model), "num_attention_heads", None), int):
        named = {type(c.module).__name__ for c in calls if re.search(_NAMED, type(c.module).__name__, re.IGNORECASE)}
        said = f"; {', '.join(sorted(named))} could not be told to be" if named else ""
        raise UnknownFamilyError(f"no module of {kind} is an attention module with heads and maps of its own{said}")
    if repeated := [name for name, n in Counter(call.name for call in attention).items() if n > 1]:
        raise UnknownFamilyError(
            f"{kind} runs {repeated[0]} more than once in a pass, so its attention belongs to no one layer"
        )
    if crowded := [name for name, n in Counter(_block_of(model, c.name)[0] for c in attention).items() if n > 1]:
        raise UnknownFamilyError(f"{kind} has more than one attention module in {crowded[0]}; one a layer is supported")
    return [_paths(model, calls, call) for call in attention]


def _looks_like(call: _Call) -> bool:
    """Whether a module is attention by its name and holds affine maps, such as that of queries, keys and values."""
    named = re.search(_NAMED, type(call.module).__name__, re.IGNORECASE)
    return bool(named) and sum(map(_is_affine, call.module.children())) >= 2


def _is_affine(module: nn.Module) -> bool:
    """Whether a module is an affine map: a Linear (quantised, with LoRA), or GPT-2's Conv1D."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _block_of(model: nn.Module, name: str) -> tuple[str, int]:
    """Name and index of the block that holds a module: the entry of the outermost list of modules on its path."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[: i + 1]), int(parts[i])
    raise UnknownFamilyError(f"{name} of {type(model).__name__} stands in no list of layers")


def layer_of(model: nn.Module, name: str) -> int:
    """Index of the block that holds the module of this name."""
    return _block_of(model, name)[1]


def _paths(model: nn.Module, calls: Sequence[_Call], attention: _Call) -> Paths:
    block, layer = _block_of(model, attention.name)
    norm = next((c.name for c in calls if c.name.startswith(f"{block}.") and _makes(c, attention)), None)
    return Paths(layer=layer, block=block, norm=norm, attention=attention.name, out_proj=_out_proj(calls, attention))


def _makes(call: _Call, attention: _Call) -> bool:
    """Whether a call turned one tensor into the input of attention."""
    given, returned = call.given, call.returned
    if given is None or returned is None or returned is not attention.given or not call.by_position:
        return False
    return call.ended < attention.begun and given is not returned and given.shape == returned.shape


def _out_proj(calls: Sequence[_Call], attention: _Call) -> str:
    """The last affine map within attention that does not take its input; or the one that takes what it returns."""
    given, returned = attention.given, attention.returned
    affine = [call for call in calls if _is_affine(call.module) and call.given is not None]
    within = [call for call in affine if attention.holds(call) and not _same(call.given, given)]
    if within:
        last = max(within, key=lambda call: call.begun)
        return next(call.name for call in within if call is last or call.holds(last))  # the outermost, as of LoRA
    after = (call for call in affine if call.begun > attention.ended and _same(call.given, returned))
    last_call = next(after, None)
    if last_call is None:
        raise UnknownFamilyError(f"{type(attention.module).__name__} at {attention.name} has no output projection")
    return last_call.name


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors share their memory and size."""
    return one is not None and other is not None and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@torch.no_grad()
def _calls(model: nn.Module) -> list[_Call]:
    """The calls of all modules in one pass over a few tokens, in order of their beginning."""
    tokens, clock, own = some_tokens(model, _N_TOKENS), itertools.count(), threading.get_ident()
    calls: list[_Call] = []
    open_calls: list[_Call] = []

    def hooks(name: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != own:
                return
            first = args[0] if args else kwargs.get("hidden_states")
            given = first if isinstance(first, Tensor) else None
            open_calls.append(_Call(name, module, next(clock), given, bool(args)))
            calls.append(open_calls[-1])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if threading.get_ident() != own:
                return
            first = output[0] if isinstance(output, tuple | list) and output else output
            call = open_calls.pop()
            call.returned, call.ended = first if isinstance(first, Tensor) else None, next(clock)

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    with evaluating(model):
        handles = [handle for name, module in model.named_modules() if name for handle in hooks(name, module)]
        try:
            hidden_states(model, tokens)
        except Exception as error:
            raise UnknownFamilyError(
                f"{type(model).__name__} does not run on tokens alone ({type(error).__name__}: {error}), so its "
                "attention cannot be found; give a causal language model"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, all modules of a model are in evaluation mode; the mode of each is restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

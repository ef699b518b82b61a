"""Threads: a model that several threads ask at once answers each as if it were alone, copied and saved in between."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from faults.cases import Case, Fault, FaultFoundError, Measured, described
from faults.models import FAMILIES, INF, language_model, mixer, patched, tokens

THREADS, ROUNDS = 4, 4


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """Patched models, CRAM language models and CRAM layers; whole passes, decoding, and copies in between."""
    makers: dict[str, Callable[[], Any]] = {
        f"patched {family}, threshold {threshold:g}": lambda f=family, t=threshold: patched(f, t, seed)
        for family in FAMILIES[:: 1 if share == 1 else 5]
        for threshold in ((0.0, INF) if family == "llama" else (0.0,))
    }
    makers |= {f"CRAM language model, {kind}": lambda k=kind: language_model(k, seed)
               for kind in ("roomy", "small", "hybrid")}  # fmt: skip
    for name, make in makers.items():
        for way, ask in ASKED.items():
            yield Case(f"threads: {way}", f"{name}: {way}", lambda m=make, a=ask: _asked(m(), a, seed), apart=True)
        for way, other in COPIES.items():
            yield Case("threads: copies in between", f"{name}: {way} in between",
                       lambda m=make, o=other: _asked(m(), _whole, seed, o), apart=True)  # fmt: skip
    for name in ("cram", "cram-slots", "cram-gumbel"):
        yield Case("threads: layers", f"layer {name}", lambda n=name: _asked(mixer(n, seed), _layer, seed), apart=True)


def _whole(model: Any, seed: int) -> Tensor:
    return model(input_ids=tokens(1, 60, seed)).logits


def _steps(model: Any, seed: int) -> Tensor:
    cache, found = None, []
    for part in tokens(1, 40, seed).split([24, *[1] * 16], dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def _generated(model: Any, seed: int) -> Tensor:
    return model.generate(tokens(1, 20, seed), max_new_tokens=12, do_sample=False, pad_token_id=0)


def _layer(layer: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 50, layer.d_model, generator=generator, dtype=torch.float64)
    return layer(x, torch.ones(2, 50).double()).y


def _saved(model: Any) -> None:
    torch.save(model, io.BytesIO())
    torch.save(model.state_dict(), io.BytesIO())


ASKED: dict[str, Callable[[Any, int], Tensor]] = {"whole passes": _whole, "decoding": _steps, "generate": _generated}
COPIES: dict[str, Callable[[Any], object]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": _saved,
}  # fmt: skip


def _asked(
    model: Any, ask: Callable[[Any, int], Tensor], seed: int, between: Callable[[Any], object] | None = None
) -> Measured:
    """Asks from several threads; every answer must be the one that a single thread gets."""
    with torch.no_grad():
        wanted = [ask(model, seed + k) for k in range(THREADS)]
    wrong: list[str] = []

    def work(k: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(ROUNDS):
                with torch.no_grad():
                    if between is not None and k == 0:
                        between(model)
                    found = ask(model, seed + k)
                if found.shape != wanted[k].shape or not torch.allclose(found, wanted[k], atol=1e-5):
                    wrong.append(f"thread {k} got another answer")
        except Exception as error:
            wrong.append(described(error))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if between is not None:
        between(model)
        with torch.no_grad():
            if not torch.allclose(ask(model, seed), wanted[0], atol=1e-5):
                wrong.append("another answer after the copies")
    if wrong:
        crashed = [said for said in wrong if "Error" in said]
        fault = Fault.TRACEBACK if len(crashed) == len(wrong) else Fault.WRONG
        raise FaultFoundError(fault, f"{len(wrong)} of {THREADS * ROUNDS} answers wrong: {wrong[0]}"[:240])
    return {"tried": THREADS * ROUNDS}

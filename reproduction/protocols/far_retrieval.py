r"""Measures retrieval from far context by a consolidated model.

What is asked for: a planted number, the rest of an earlier line, and with `--kinds` one of eight planted numbers, after
RULER's multi-key needles (Hsieh et al. 2024).

    python -m reproduction.protocols.far_retrieval smollm2 runs/smollm2 --text stdlib --context 2048 \\
        --out runs/smollm2/retrieval.json

Answers are scored by teacher forcing: an answer is right when every token of it would have been chosen. Both models see
the same prompts, planted in documents that nothing was learned from. The record holds the distance of each answer, so
it shows where answers are lost.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cramlab import load_consolidated, records, skip_counts
from cramlab.auditing import read_corpus
from cramlab.config import from_dict
from cramlab.consolidation.config import ConsolidationConfig
from cramlab.consolidation.documents import held_out_at
from cramlab.consolidation.folder import load_record
from cramlab.consolidation.patch.install import closed, installed
from cramlab.consolidation.rules.learned import ConsolidatedAttention
from cramlab.files import write_json
from cramlab.hf.loading import load

NAMES = ["Lisbon", "Oslo", "Nairobi", "Lima", "Quebec", "Hanoi", "Vienna", "Dakar"]


def planted(filler, facts, question, answer, context, generator):
    """A prompt with facts at random positions in the first three quarters, in their order, and the question at the end.

    Returns:
        Prompt, answer, and how many tokens the end of each fact is before the end of the prompt.
    """
    room = context - sum(map(len, facts)) - len(question) - len(answer)
    if room < len(facts):
        raise SystemExit(f"--context {context} has no room for {len(facts)} facts; give a longer one")
    places = sorted(int(room * generator.uniform(0.05, 0.75)) for _ in facts)
    prompt, distances = list(filler[:room]), []
    for fact, place in zip(reversed(facts), reversed(places), strict=True):
        distances.append(len(prompt) - place + len(question))
        prompt[place:place] = fact
    return [*prompt, *question], answer, distances[::-1]


def one_of_eight(encode, filler, context, generator):
    """A prompt with the numbers of eight names, and the question for one; see `needle`."""
    numbers = {name: str(generator.randint(10_000, 99_999)) for name in generator.sample(NAMES, len(NAMES))}
    facts = [encode(f"\n# The secret number of {name} is {number}.\n") for name, number in numbers.items()]
    asked = generator.choice(NAMES)
    question, answer = encode(f"\n# The secret number of {asked} is"), encode(f" {numbers[asked]}")
    prompt, answer, distances = planted(filler, facts, question, answer, context, generator)
    return prompt, answer, distances[list(numbers).index(asked)]


def needle(encode, filler, context, generator):
    """A prompt with a number at a random position in the first three quarters and the question at the end.

    Returns:
        Prompt, answer, and how many tokens the end of the fact is before the end of the prompt.
    """
    name = generator.choice(NAMES)
    number = str(generator.randint(10_000, 99_999))
    fact = encode(f"\n# The secret number of {name} is {number}.\n")
    question, answer = encode(f"\n# The secret number of {name} is"), encode(f" {number}")
    prompt, answer, (distance,) = planted(filler, [fact], question, answer, context, generator)
    return prompt, answer, distance


def earlier_line(_, filler, context, generator):
    """A prompt that repeats sixteen tokens of its first half at the end and asks for the next eight; see `needle`."""
    at = generator.randrange(16, context // 2)
    piece = filler[at : at + 24]
    return [*filler[: context - 24], *piece[:16]], piece[16:], context - 24 - at


KINDS = {"needle": needle, "earlier line": earlier_line, "one of eight": one_of_eight}


def answered(model, prompt, answer):
    """Whether every token of the answer would have been chosen, and its nats per token."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    keep = len(answer) + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1].float()
    wanted = torch.tensor(answer, device=device)
    nats = torch.nn.functional.cross_entropy(logits, wanted)
    return bool((logits.argmax(-1) == wanted).all()), float(nats)


def at_most(model: torch.nn.Module, record: Mapping[str, Any], skipped_frac: float) -> None:
    """Gives all gates of a consolidated model the boldest threshold of its ladder that skips at most this share."""
    rungs = [row for row in (record, *record.get("ladder", ())) if row["skipped_frac"] <= skipped_frac]
    if not rungs:
        raise SystemExit(f"--skipped-frac {skipped_frac:g}: the folder has no threshold that skips so little")
    threshold = max(rungs, key=lambda row: row["skipped_frac"])["threshold"]
    for layer in installed(model).values():
        assert isinstance(layer, ConsolidatedAttention)
        layer.threshold = math.inf if threshold is None else threshold


def main(given: Sequence[str] | None = None) -> None:
    """Runs what the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS)[:2], help="what is asked for")
    parser.add_argument(
        "--skipped-frac",
        type=float,
        default=1.0,
        help="take a threshold for at most this share (default: the folder's)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pretrained, record = load(args.model), load_record(args.folder)
    config = from_dict(record["config"], ConsolidationConfig())
    pretrained.model.to(args.device)
    found = held_out_at(pretrained, read_corpus(args.text), config, args.context, args.prompts)
    fillers = [tokens.tolist() for tokens in found]
    model = load_consolidated(pretrained.model, args.folder)
    at_most(model, record, args.skipped_frac)
    data = {
        "kind": "retrieval",
        "header": records.header(next(model.parameters()).device),
        "context": args.context,
        "prompts": len(fillers),
        "kinds": {},
        "distance": {},
    }
    for kind in args.kinds:
        generator, make = random.Random(0), KINDS[kind]
        rows, distances = {"original": [], "consolidated": []}, []
        for filler in fillers:
            prompt, answer, distance = make(pretrained.encode, filler, args.context, generator)
            distances.append(distance)
            with closed(model):
                rows["original"].append(answered(model, prompt, answer))
            rows["consolidated"].append(answered(model, prompt, answer))
        data["kinds"][kind] = {
            who: {"right": [right for right, _ in row], "nats": [nats for _, nats in row]} for who, row in rows.items()
        }
        data["distance"][kind] = distances
        for who, row in rows.items():
            right = sum(r for r, _ in row)
            print(kind, who, f"{right}/{len(row)}", f"{sum(n for _, n in row) / len(row):.3f} nats", flush=True)
    data["skipped_frac"] = skip_counts(model).total.skipped_frac
    write_json(args.out, data)


if __name__ == "__main__":
    main()

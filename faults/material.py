"""Small things to work on: a model folder, texts, clinical tables, finished work of every command."""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from cramlab.tasks.irregular.physionet2012 import PHYSIONET_CHANNELS

CONTEXT, WINDOW, N_SINKS = 48, 8, 2


@functools.cache
def workspace() -> Path:
    """A scratch folder that goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="cramlab-faults-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def fresh(name: str, file: str = "it") -> Path:
    """A path in the scratch folder that is not there yet; its parent is, and holds nothing else."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-{os.getpid()}-", dir=workspace())) / file


def _once(make: Callable[[Path], None]) -> Callable[[], Path]:
    """Makes a folder or file at first use."""

    @functools.cache
    def made() -> Path:
        path = workspace() / make.__name__
        make(path)
        return path

    return made


def words(rng: random.Random, n_characters: int) -> str:
    """Text of made-up words that never repeats for long."""
    syllables = ["ka", "lo", "mi", "re", "tu", "san", "ter", "vo", "el", "pri"]
    made = []
    while sum(map(len, made)) < n_characters:
        made.append("".join(rng.choices(syllables, k=rng.randint(1, 4))) + rng.choice([" ", " ", " ", ". ", ",\n"]))
    return "".join(made)[:n_characters]


@_once
def texts(path: Path) -> None:
    """A folder of 60 different texts."""
    path.mkdir()
    rng = random.Random(0)
    for i in range(60):
        (path / f"{i:02}.txt").write_text(words(rng, 600), encoding="utf-8")


@_once
def model_folder(path: Path) -> None:
    """A random Llama of two layers with a tokenizer of single bytes, as transformers saves it."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


@_once
def stays(path: Path) -> None:
    """Forty stays in the format of PhysioNet 2012."""
    (path / "set-a").mkdir(parents=True)
    rng = random.Random(0)
    outcomes = ["RecordID,In-hospital_death"]
    for i in range(40):
        outcomes.append(f"{i},{i % 2}")
        (path / "set-a" / f"{i}.txt").write_text(stay(rng), encoding="utf-8")
    (path / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n", encoding="utf-8")


def stay(rng: random.Random) -> str:
    """One stay in the format of PhysioNet 2012."""
    rows = ["Time,Parameter,Value", "00:00,Age,60", "00:00,Gender,1", "00:00,Height,170", "00:00,ICUType,2"]
    for hour in range(1, 4):
        rows += [f"{hour:02}:00,{channel},{rng.uniform(5, 90):.1f}" for channel in PHYSIONET_CHANNELS]
    return "\n".join(rows) + "\n"


def copied(source: Path, name: str) -> Path:
    """A copy of a file or folder that a case may damage."""
    target = fresh(name)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target

"""Bad inputs: each must be refused with one clear line (from Python: a documented exception), or answered rightly."""

from __future__ import annotations

from collections.abc import Iterator

from faults import bad_calls, bad_files, bad_models, bad_settings, bad_tables, bad_texts
from faults.cases import Case


def cases(seed: int, share: float = 1.0) -> Iterator[Case]:
    """All generators, one after another."""
    for generator in (bad_settings, bad_files, bad_models, bad_texts, bad_tables, bad_calls):
        yield from generator.cases(seed, share)

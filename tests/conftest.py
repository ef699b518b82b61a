"""Every test computes on one thread, from the same seed, and reads NaN from memory that nothing has written."""

import dataclasses
import multiprocessing

import pytest
import torch


def _strict():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _strict_for_shared_fixtures():
    """Fixtures of a module are computed before those of its first test, and must not depend on the module before."""
    _strict()


@pytest.fixture(autouse=True)
def _strict_for_each_test():
    _strict()


@pytest.fixture(scope="module")
def short_stdlib():
    """The text `stdlib` with every third document, cut off after 6,000 characters.

    Reading and tokenising all of it takes a command seconds.
    """
    from cramlab.text import packaged

    documents = tuple(dataclasses.replace(d, text=d.text[:6000]) for d in packaged._stdlib()[::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaged, "_stdlib", lambda: documents)
        yield


@pytest.fixture
def forked(monkeypatch):
    """Runs side by side are forked, so that they import nothing; `make srcd` in tests/test_readme.py spawns them."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr("cramlab.training.jobs.multiprocessing.get_context", lambda _: context)

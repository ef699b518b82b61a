"""Every test computes on one thread, from the same seed, and reads NaN from memory that nothing has written."""

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

"""One count of every network for all tests: building the large ones takes most of the time."""

import pytest

from onestepsr.benchmark.complexity import Report, default_names, measure


@pytest.fixture(scope="session")
def report() -> Report:
    """Every network at the size of the paper's table."""
    return Report(side=512, networks=[measure(name, 512) for name in default_names()])

"""One count of every network for all tests: building the large ones takes most of the time."""

import pytest

from onestepsr.benchmark.complexity import compare_adapters, default_names, measure
from onestepsr.benchmark.complexity_report import Report


@pytest.fixture(scope="session")
def report() -> Report:
    """Every network at the size of the paper's table."""
    networks = [measure(name, 512) for name in default_names()]
    return Report(side=512, networks=networks, adapters=compare_adapters(512, networks))

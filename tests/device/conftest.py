"""`--dry-run`: the same tests on the CPU, so that they work when there is an accelerator."""

from __future__ import annotations

import pytest


def pytest_addoption(parser):
    parser.addoption("--dry-run", action="store_true", help="the tests of accelerators on the CPU, at small sizes")


@pytest.fixture(scope="session")
def device(request):
    return "cpu" if request.config.getoption("--dry-run") else "cuda"

"""`--dry-run`: the same tests on the CPU, so that they work when there is an accelerator."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--dry-run", action="store_true", help="the tests of accelerators on the CPU, at small sizes")

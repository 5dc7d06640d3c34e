"""The C++ extension is there wherever it can be built: without it kernel tests would have nothing to run."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

COMPILERS = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]


@pytest.mark.skipif(not any(map(shutil.which, filter(None, COMPILERS))), reason="no C++ compiler here")
@pytest.mark.skipif("WEMM_NO_EXTENSION" in os.environ, reason="installed without it on purpose")
def test_with_a_compiler_there_is_an_extension():
    """An install goes on without it where the build fails: `pip install -v -e .` shows why."""
    assert importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None

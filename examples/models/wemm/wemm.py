"""The original's runner: `python -m examples.models.wemm.wemm …`, or this file as a script.

It bears the package's name. Scripts of this directory have it first on their path, so that their `import wemm`
finds this file: it then steps aside for the package.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]


def _find_package() -> None:
    """Let `wemm` mean the package: the installed one, else that of this clone, here and in child processes."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
    spec = find_spec("wemm")
    if spec is None or spec.origin is None:  # nothing, or a mere directory of that name
        source = str(_ROOT / "src")
        sys.path.append(source)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), source]))


if __name__ == "wemm":
    del sys.modules["wemm"]
    _find_package()
    importlib.import_module("wemm")
elif __name__ == "__main__":
    _find_package()
    sys.path.insert(0, str(_ROOT))
    from examples.models.wemm.runner import main

    sys.exit(main())

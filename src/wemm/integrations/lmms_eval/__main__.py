"""`python -m wemm.integrations.lmms_eval …` is `lmms-eval …` that knows our model and our task."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from wemm.errors import ClientError
from wemm.integrations import module_of
from wemm.integrations.lmms_eval import INSTALL, TASKS, manifest


def main(arguments: Sequence[str]) -> int:
    """Run lmms-eval with its own options. Returns the exit status."""
    try:
        models = module_of("lmms-eval", "lmms_eval.models", INSTALL)
        command = module_of("lmms-eval", "lmms_eval.__main__", INSTALL)
        models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_given = any(argument.split("=")[0] == "--include_path" for argument in arguments)
    include = [] if is_given else ["--include_path", str(TASKS)]
    sys.argv = ["lmms-eval", *arguments, *include]
    command.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

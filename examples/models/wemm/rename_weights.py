"""The original's command line for renaming hub weights; `wemm convert SRC DST` does the work.

python examples/models/wemm/rename_weights.py --src_model_path SRC --save_directory DST
"""

from __future__ import annotations

import argparse
import sys

from wemm.cli import main


def rename_weights() -> int:
    """Parse the original's arguments and convert. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Rename the tensors of a hub checkpoint of WeMM-Chat-2k-CN.")
    parser.add_argument("--src_model_path", required=True, help="directory of the hub checkpoint")
    parser.add_argument("--save_directory", required=True, help="directory to write")
    arguments = parser.parse_args()
    return main(["convert", arguments.src_model_path, arguments.save_directory])


if __name__ == "__main__":
    sys.exit(rename_weights())

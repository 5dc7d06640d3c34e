"""Schemas of the fused ops that kernels/npu calls, as published wheels of torch_npu carry them → op_schemas.json.

$ pip download --no-deps -d wheels torch-npu==2.7.1     # one directory for all versions
$ python tests/kernels/npu/extract_schemas.py wheels/torch_npu-*.whl

A wheel registers its ops from strings inside torch_npu/lib/libtorch_npu.so; those are what is read.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

OPS = (
    "npu_dynamic_quant",
    "npu_fused_infer_attention_score_v2",
    "npu_quant_matmul",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_nd_update_",
    "npu_swiglu",
)
LIBRARY = "torch_npu/lib/libtorch_npu.so"


def schemas_of(library: bytes) -> dict[str, str]:
    found = {}
    for op in OPS:
        schemas = set(re.findall(rb"(?<=\0)" + op.encode() + rb"\([^\0]*\) -> [^\0]+(?=\0)", library))
        [found[op]] = (schema.decode() for schema in schemas)
    return found


def main(wheels: list[str]) -> None:
    versions = {}
    for wheel in sorted(map(Path, wheels)):
        with zipfile.ZipFile(wheel) as archive:
            versions[wheel.name] = schemas_of(archive.read(LIBRARY))
    text = json.dumps({"extracted_by": Path(__file__).name, "wheels": versions}, indent=1)
    Path(__file__).with_name("op_schemas.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

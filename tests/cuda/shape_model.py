# SPDX-License-Identifier: MIT
"""shape_model.py OUT.gguf LAYERS WIDTH HEADS KV_HEADS HEAD_SIZE FF: a llama of random Q8_0 weights, to measure on.

The writer of `tbq bench speed --shape`, where the package is not installed.
"""

import importlib.util
import pathlib
import sys

FILE = pathlib.Path(__file__).resolve().parents[2] / "python" / "tbq" / "shape.py"


def load():
    spec = importlib.util.spec_from_file_location("tbq_shape", FILE)
    module = sys.modules["tbq_shape"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    shape = load()
    shape.write(pathlib.Path(sys.argv[1]), shape.Shape(*map(int, sys.argv[2:])))

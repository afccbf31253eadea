# SPDX-License-Identifier: MIT
"""shape_model.py OUT.gguf LAYERS WIDTH HEADS KV_HEADS HEAD_SIZE FF: a llama of random Q8_0 weights, to measure on.

The writer of `tbq bench speed --shape`, for machines where the package is not installed.
"""

import pathlib
import sys
import types

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "python" / "tbq"


def write(path, *shape):
    # the package's own __init__ wants the compiled module; this one only says where the modules are
    package = sys.modules["tbq"] = types.ModuleType("tbq")
    package.__path__ = [str(PACKAGE)]
    from tbq.bench.random_model import RandomModel, write_random_model

    write_random_model(path, RandomModel(*shape))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""shape_model.py OUT.gguf LAYERS WIDTH HEADS KV_HEADS HEAD_SIZE FF: a llama of random Q8_0 weights, to measure on.

`tbq bench speed`'s writer, fed with one pool of random numbers: 7 GB of fresh ones take longer than the measurement.
"""
import importlib.util
import pathlib
import sys
import types

import numpy as np

BENCH = pathlib.Path(__file__).resolve().parents[2] / "python" / "tbq" / "bench.py"


def load_writer():
    """bench.py by itself, where the package is not installed."""
    for name, attributes in (("tbq", {}), ("tbq.errors", {"TBQError": Exception}), ("tbq.paths", {"program": None})):
        if name not in sys.modules:
            module = types.ModuleType(name)
            vars(module).update(attributes)
            sys.modules[name] = module
    spec = importlib.util.spec_from_file_location("tbq_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_shape_model


class Pool:
    """Generator.integers(-127, 128, ..., int8) out of 32 MB, from another place each time."""

    def __init__(self, seed):
        self.numbers = np.random.Generator(np.random.SFC64(seed)).integers(-127, 128, 1 << 25, np.int8)
        self.calls = 0

    def integers(self, low, high, shape, dtype):
        self.calls += 1
        return np.resize(np.roll(self.numbers, 7919 * self.calls), shape)


if __name__ == "__main__":
    np.random.default_rng = Pool
    keys = ("layers", "width", "heads", "kv_heads", "head_size", "ff")
    load_writer()(sys.argv[1], vocab=32000, **dict(zip(keys, map(int, sys.argv[2:]))))

# SPDX-License-Identifier: MIT
"""Makes tbq.hf importable from python/, also where the package is not compiled.  Imported for that alone."""

import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))
try:
    import tbq  # noqa: F401
except ImportError:  # no cffi, or not compiled: the submodules that are needed do without
    package = types.ModuleType("tbq")
    package.__path__ = [str(ROOT / "python" / "tbq")]
    sys.modules["tbq"] = package

#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""emit_ffi.py CDEF OUT: writes the C source of the module tbq._ffi to OUT, from the declarations in CDEF."""

import pathlib
import sys

import cffi

HEADERS = ("tbq.h", "tbq-attention.h", "tbq-kernels.h", "tbq-search.h")


def main(cdef: str, out: str) -> None:
    ffi = cffi.FFI()
    ffi.cdef(pathlib.Path(cdef).read_text(encoding="utf-8"))
    ffi.set_source("tbq._ffi", "".join(f'#include "{header}"\n' for header in HEADERS))
    ffi.emit_c_code(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

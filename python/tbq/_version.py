# SPDX-License-Identifier: MIT
"""The versions of the package and of the format, which the C library defines."""

from tbq._ffi import ffi, lib

__version__ = ffi.string(lib.tbq_version()).decode()
FORMAT_VERSION = lib.TBQ_FORMAT_VERSION

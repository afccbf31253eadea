# SPDX-License-Identifier: MIT
"""Versions, as the library states them."""

from tbq._ffi import ffi, lib

__version__ = ffi.string(lib.tbq_version()).decode()
FORMAT_VERSION = lib.TBQ_FORMAT_VERSION

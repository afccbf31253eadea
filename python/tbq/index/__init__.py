# SPDX-License-Identifier: MIT
"""A flat index of vectors in tbq blocks: exhaustive search, no training.

>>> from tbq.index import Index
"""

from tbq.index.index import Index

__all__ = ["Index"]

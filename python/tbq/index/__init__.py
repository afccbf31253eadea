# SPDX-License-Identifier: MIT
"""A flat vector index over tbq blocks: exhaustive search, no training.

>>> from tbq.index import Index
"""

from tbq.index.index import Index

__all__ = ["Index"]

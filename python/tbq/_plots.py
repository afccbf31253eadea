# SPDX-License-Identifier: MIT
"""Pictures that a command draws in addition to its output."""

import os
import pathlib

from tbq._files import target
from tbq.errors import TBQError, one_line


def picture_format(path: pathlib.Path, option: str = "--plot") -> str:
    """The format that the ending of a name means; TBQError if it cannot be drawn or written.

    option: the option that named it, for messages.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise TBQError(f"{option} needs matplotlib: pip install 'ggml-tbq[plot]'") from None
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise TBQError(f"{option} {str(path)!r} must end in one of .{', .'.join(sorted(formats))}")
    try:
        folder = target(path).parent
    except (TBQError, OSError) as error:
        raise TBQError(f"{option} {str(path)!r} cannot be written: {one_line(error)}") from None
    if not os.access(folder, os.W_OK):
        raise TBQError(f"{option} {str(path)!r} cannot be written: {folder} is not a folder that can be written to")
    return path.suffix[1:].lower()

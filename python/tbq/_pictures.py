# SPDX-License-Identifier: MIT
"""Files that a command writes beside its output: whole or not at all."""
import os
import pathlib
import tempfile

from tbq.errors import TBQError


def picture_format(path: pathlib.Path) -> str:
    """The format that a name asks for; TBQError if it cannot be drawn or written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise TBQError("--plot needs matplotlib: pip install 'ggml-tbq[plot]'") from None
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise TBQError(f"--plot {str(path)!r} must end in one of .{', .'.join(sorted(formats))}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise TBQError(f"--plot {str(path)!r} cannot be written")
    return path.suffix[1:].lower()


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise

"""The one exception of this package."""


class TBQError(ValueError):
    """A wrong argument or a missing file; the text is one line that names it and what would work."""

"""Reading files that somebody else wrote."""

import errno
from pathlib import Path


def file_bytes(path: str | Path) -> bytes:
    """The content of a regular file; OSError for a device or a pipe, which would give without end, or nothing for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(path).read_bytes()

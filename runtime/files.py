"""Files of others."""

import errno
from pathlib import Path


def file_bytes(path):
    """The content of a regular file: a device or a pipe would give without end, or nothing for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(path).read_bytes()

"""Files that outlive a process: where they lie, and how they are written whole or not at all.

A sealed file begins with a line that says what it is and a checksum of the rest: one that is missing, truncated or
garbled is as good as none, and so is a folder that cannot be written. Files appear by an atomic rename, so any number
of processes may write the same one at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

__all__ = ["cache_dir", "read_sealed", "replace_file", "write_sealed"]

CHECKSUM_BYTES = 32


def cache_dir() -> Path:
    """Where compiled kernels are kept: $SHFLNB_CACHE_DIR, or the user's cache directory."""
    given = os.environ.get("SHFLNB_CACHE_DIR")
    if given:
        return Path(given) / "kernels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("shflnb")) / "kernels"


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` into a file, and make its folder; OSError where that cannot be, and then nothing has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_sealed(path: Path, magic: bytes, body: bytes) -> None:
    """Write a sealed file; where that cannot be, a later process computes the body again, and nothing else happens."""
    with contextlib.suppress(OSError):
        replace_file(path, magic + hashlib.sha256(body).digest() + body)


def read_sealed(path: Path, magic: bytes) -> bytes | None:
    """The body of a sealed file, or None where there is no sound one."""
    try:
        blob = path.read_bytes()
    except OSError:
        return None
    start = len(magic) + CHECKSUM_BYTES
    body = blob[start:]
    if not blob.startswith(magic) or hashlib.sha256(body).digest() != blob[len(magic) : start]:
        return None
    return body

"""What was measured on this machine, from one process to the next: one small JSON file per device.

`select.choose` stays pure: a caller hands it the table of `load`. A file that is missing, truncated, garbled or from
another version counts as empty (its products are chosen by the committed table or the rule), entry by entry. Writers
merge under a lock and replace the file in one step, so several processes may tune at once.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .config import Config
from .disk_cache import cache_dir, replace_file
from .skinny_config import SkinnyConfig

__all__ = ["FEW", "entry_of", "forget", "load", "store", "table_path", "valid_entries"]

FORMAT = 1
LOCK_SECONDS = 10.0
NOT_KEPT = ("dtype", "epilogue", "parts")  # a tiling serves every dtype and epilogue
FEW = "few "
"""How the keys of entries for few columns begin, before what all keys have: they are the fields of a SkinnyConfig."""

_TABLES: dict[str, dict[str, dict[str, Any]]] = {}
_LOCK = threading.Lock()


def table_path(device_name: str) -> Path:
    """The file of a device, in the cache directory of the compiled kernels."""
    name = "".join(c if c.isalnum() else "-" for c in device_name.lower())
    return cache_dir().parent / "tuned" / f"{name}.json"


def entry_of(config: Config | SkinnyConfig) -> dict[str, Any]:
    """What a table keeps of a config."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_KEPT}


def valid_entries(entries: Any) -> dict[str, dict[str, Any]]:
    """The entries that name a config this version can build; a table from elsewhere may hold anything."""
    good: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(key, str):
            continue
        kind: type[Config] | type[SkinnyConfig] = SkinnyConfig if key.startswith(FEW) else Config
        try:
            config = kind(**entry)
        except (TypeError, ArgumentError):
            continue
        if key.removeprefix(FEW).startswith(f"v{config.v} "):
            good[key] = entry_of(config)
    return good


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return {}
    return valid_entries(found.get("entries"))


def load(device_name: str) -> Mapping[str, dict[str, Any]]:
    """The remembered entries of a device, read once per process.

    `select.table_key` -> fields of a Config, `skinny_select.few_key` -> fields of a SkinnyConfig.
    """
    found = _TABLES.get(device_name)
    if found is None:
        with _LOCK:
            found = _TABLES.setdefault(device_name, _read(table_path(device_name)))
    return found


def store(device_name: str, entries: Mapping[str, Mapping[str, Any]]) -> bool:
    """Add entries to what is remembered, here and on the disk; False when the disk cannot be written."""
    from filelock import FileLock, Timeout

    new = {key: dict(entry) for key, entry in entries.items()}
    with _LOCK:
        _TABLES[device_name] = {**_TABLES.get(device_name, {}), **new}
    path = table_path(device_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            merged = {**_read(path), **new}
            text = json.dumps({"format": FORMAT, "device": device_name, "entries": merged}, indent=1)
            replace_file(path, text.encode())
    except (OSError, Timeout, NotImplementedError):
        return False
    with _LOCK:
        _TABLES[device_name] = {**merged, **_TABLES[device_name]}
    return True


def forget(device_name: str) -> None:
    """Drop what is remembered of a device, here and on the disk."""
    with _LOCK:
        _TABLES[device_name] = {}
    with contextlib.suppress(OSError):
        table_path(device_name).unlink(missing_ok=True)

"""Files that are never half written: atomic text and bytes, versioned zarr stores, free space, hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openmm_hvpcg._version import __version__
from openmm_hvpcg.errors import DataError, StorageError
from openmm_hvpcg.units import UNITS

PathLike = str | os.PathLike[str]
#: A path, a URL that fsspec knows (``s3://bucket/labels.zarr``), or a zarr store.
StoreLike = Any


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on a clean exit it takes ``path``'s place, else it is removed.

    It has the ending of ``path``, for writers that choose the format by it.
    """
    target = Path(path)
    temporary = _temporary_path(target)
    try:
        with explain_disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
    finally:
        # Where a file stands in the place of a folder there is no temporary file either.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{os.getpid()}.tmp.{target.name}")


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


@contextlib.contextmanager
def explain_disk_errors(where: object) -> Iterator[None]:
    """Turn "no space left", "read-only", "permission denied", "not a folder" into a :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                "no space left on the disk",
                where=where,
                hint="free some space and run the same command again",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(
                f"cannot write ({error.strerror})",
                where=where,
                hint="choose an output folder you may write to",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageError(
                f"cannot write: {error.filename or where} is in the way ({error.strerror})",
                where=where,
                hint="choose another output folder",
            ) from error
        raise


def describe_changes(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys of a section of settings that differ, each as ``section.key (old -> new)``."""
    return [
        f"{section}.{key} ({old.get(key)} -> {new.get(key)})" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def check_free_space(path: PathLike, n_bytes: int) -> None:
    """Raise :class:`StorageError` unless the disk that will hold ``path`` has ``n_bytes`` free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise StorageError(
            "not enough disk space",
            expected=f"{n_bytes / 1e6:.1f} MB free",
            got=f"{free / 1e6:.1f} MB",
            where=path,
            hint="free some space, or ask for fewer frames",
        )


def split_rows(values: Any, n_bytes: int = 2**24) -> list[slice]:
    """Slices of the first axis of an array, of about ``n_bytes`` each, which leave out nothing."""
    size = max(1, n_bytes // max(1, values.dtype.itemsize * math.prod(values.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(values), size)]


def compute_hash(*parts: Any) -> str:
    """SHA-256 of text, bytes and arrays (their dtype, shape and values), in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (bytes, str)):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            for rows in split_rows(part) if part.shape else [...]:
                digest.update(np.ascontiguousarray(part[rows]).tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


def hash_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def create_store(
    path: PathLike,
    kind: str,
    version: int,
    attributes: dict[str, Any],
    add_arrays: Callable[[Any], None] | None = None,
) -> Any:
    """Create a zarr group of a kind and version of ours, with the package's units; refuse to overwrite.

    It is built beside its place and moved in, so that a store that exists always has its header and what
    ``add_arrays``, called with the new group, puts into it.
    """
    import zarr

    target = Path(path)
    if target.exists():
        raise StorageError("already exists", where=target, hint="move it away or choose another path")
    temporary = _temporary_path(target)
    header: dict[str, Any] = {
        "format": f"openmm-hvpcg/{kind}",
        "format_version": version,
        "units": UNITS,
        "package_version": __version__,
    }
    try:
        with explain_disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.open_group(str(temporary), mode="w", zarr_format=3, attributes={**header, **attributes})
            if add_arrays is not None:
                add_arrays(group)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return zarr.open_group(str(target), mode="r+")


def is_local(store: StoreLike) -> bool:
    """Whether it is a path, and not a URL or a store."""
    return isinstance(store, os.PathLike) or (isinstance(store, str) and "://" not in store)


def open_store(path: StoreLike, kind: str, version: int, mode: str = "r") -> Any:
    """Open a store made by :func:`create_store`, or a copy of one elsewhere; check kind, format version and units.

    Raises
    ------
    DataError
        Not a store, another kind, a newer format, other units.
    """
    import zarr

    if is_local(path) and not Path(path).exists():
        raise DataError(f"there is no {kind} store", where=path, hint="run the stage that writes it")
    try:
        group = zarr.open_group(str(path) if is_local(path) else path, mode=mode)  # type: ignore[arg-type]
        attributes = dict(group.attrs)
    except Exception as error:
        raise DataError("not a readable zarr group", expected=f"{kind} store", where=path) from error
    if attributes.get("format") != f"openmm-hvpcg/{kind}":
        raise DataError(
            "wrong kind of file",
            expected=f"openmm-hvpcg/{kind}",
            got=attributes.get("format", "none"),
            where=path,
        )
    found = attributes.get("format_version")
    if found != version:
        newer = isinstance(found, int) and found > version
        raise DataError(
            f"format version is {'too new' if newer else 'not supported'}",
            expected=version,
            got=found,
            where=path,
            hint="upgrade openmm-hvpcg" if newer else "make the file again with this version",
        )
    if attributes.get("units") != UNITS:
        raise DataError(
            "units differ", expected=UNITS, got=attributes.get("units"), where=path, hint="convert the file"
        )
    return group


def read_array(group: Any, name: str, path: StoreLike, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """Read one array of a store whole; a missing, damaged or misshapen one is a :class:`DataError`."""
    try:
        values = np.asarray(group[name][...])
    except KeyError as error:
        raise DataError(f"array {name!r} is missing", where=path, hint="make the file again") from error
    except Exception as error:
        raise DataError(f"array {name!r} is damaged ({error})", where=path, hint="make the file again") from error
    if shape is not None and (
        values.ndim != len(shape)
        or any(want is not None and want != have for want, have in zip(shape, values.shape, strict=True))
    ):
        raise DataError(f"array {name!r} has the wrong shape", expected=shape, got=values.shape, where=path)
    return values

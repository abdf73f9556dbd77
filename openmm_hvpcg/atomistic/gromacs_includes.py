"""Which files a GROMACS topology includes."""

from __future__ import annotations

from pathlib import Path

from openmm_hvpcg.storage import hash_file

DIRECTIVE = "#include"


def find_includes(top: Path, include_folder: Path | None = None) -> list[Path]:
    """Files that ``top`` includes, and those that these include, where OpenMM's reader finds them.

    Whatever ``#ifdef`` says, so that there may be more of them than are read; what is nowhere is left out, and missed
    by the reader where it needs it.
    """
    folder = _get_default_folder() if include_folder is None else include_folder
    found: list[Path] = []
    to_read = [top]
    while to_read:
        file = to_read.pop()
        for name in _list_names(file):
            paths = (parent / name for parent in (top.parent, folder, file.parent))
            path = next((p for p in paths if p.is_file()), None)
            if path is not None and path not in found:
                found.append(path)
                to_read.append(path)
    return sorted(found)


def hash_includes(base: Path, top: str, include_folder: str | None) -> dict[str, str]:
    """SHA-256 of the files that ``base / top`` includes, by their path: relative to ``base`` where below it."""
    found = find_includes(base / top, None if include_folder is None else base / include_folder)
    return {str(p.relative_to(base) if p.is_relative_to(base) else p): hash_file(p) for p in found}


def _list_names(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = (line.split(";")[0].strip() for line in text.splitlines())
    return [line[len(DIRECTIVE) :].strip(' \t"<>') for line in lines if line.startswith(DIRECTIVE)]


def _get_default_folder() -> Path:
    # Here, so that what only looks at settings does not wait for OpenMM.
    from openmm.app.gromacstopfile import _defaultGromacsIncludeDir

    return Path(_defaultGromacsIncludeDir())

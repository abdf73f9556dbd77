"""What pydantic found wrong with a section, in the words of a user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def suggest(key: str, known: Sequence[str]) -> str:
    """The known key that was meant, or all of them, to be put behind a message."""
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(known)}"


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line of all problems, each with its key."""
    lines: dict[str, None] = {}
    for item in error.errors():
        location = item["loc"]
        key = ".".join(str(part) for part in location if not _is_union_tag(part))
        if item["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            lines[f"unknown key {key!r}{suggest(str(location[-1]), known)}"] = None
        elif item["type"] == "missing":
            lines[f"{key}: missing"] = None
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = re.sub(r"a valid dictionary or instance of \w+", "a section with keys", message)
            got = "" if item["type"] == "value_error" else f", got {_shorten(item['input'])}"
            lines[f"{key}: {message[:1].lower()}{message[1:]}{got}" if key else message] = None
    return "; ".join(lines)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part in ("str", "int", "float") or part.startswith(("literal[", "list[", "dict[", "constrained-"))
    )


def _fields_at(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the model found by walking ``location`` from ``root``."""
    model: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ())
        model = next((a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)), annotation)
    return list(model.model_fields)

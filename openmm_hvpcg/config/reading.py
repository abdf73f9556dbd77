"""Protocols from YAML and to YAML; what is wrong with one, in one line that names the key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from openmm_hvpcg.config.atomistic import InputSettings, MoleculeSettings
from openmm_hvpcg.config.problems import explain
from openmm_hvpcg.config.protocol import Protocol
from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.storage import PathLike


def load_protocol(path: PathLike, overrides: Sequence[str] = ()) -> Protocol:
    """Read and validate a protocol YAML.

    Parameters
    ----------
    path : the YAML file
    overrides : ``section.key=value`` each, value YAML; ``molecules.0.input.sequence=AA`` reaches into lists
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such protocol file", where=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from error
    content = _parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ConfigError("not a protocol", expected="sections with keys", got=type(content).__name__, where=path)
    for override in overrides:
        _apply_override(content, override)
    return validate_protocol(content, where=path)


def validate_protocol(content: dict[str, Any], where: object = None) -> Protocol:
    """Validate parsed YAML; errors name the key."""
    try:
        return Protocol.model_validate(content)
    except ConfigError as error:
        raise ConfigError(str(error), where=where) from error
    except ValidationError as error:
        raise ConfigError(explain(error, Protocol), where=where) from error


def dump_protocol(protocol: Protocol) -> str:
    """The protocol as YAML with every default written out."""
    return yaml.safe_dump(protocol.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def describe_defaults() -> str:
    """All sections with their defaults as YAML, each key's meaning as a comment."""
    lines = ["temperature_K: 300.0", "molecules:   # required", "  - name: NAME"]
    molecule = MoleculeSettings.model_fields
    lines.append(f"    role: {_show(molecule['role'])}")
    lines.append("    input:   # one of sequence, pdb, prmtop + coordinates, system_xml + pdb")
    lines += [f"      {key}: {_show(field)}" for key, field in InputSettings.model_fields.items()]
    lines.append(f"    native_pdb: {_show(molecule['native_pdb'])}")
    for name, field in Protocol.model_fields.items():
        if name in ("temperature_K", "molecules"):
            continue
        lines += _describe_section(name, field)
    return "\n".join(lines) + "\n"


def _describe_section(name: str, field: Any) -> list[str]:
    """A key and the keys below it; one that is off unless it is given has them as comments."""
    is_optional = type(None) in get_args(field.annotation)
    candidates = get_args(field.annotation) if is_optional else (field.annotation,)
    section = next((a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)), None)
    if section is None:
        return [f"{name}: {_show(field)}"]
    off = field.default is None
    head = f"{name}: null   # {field.description or 'off'}; on with any of these keys, or {{}}" if off else f"{name}:"
    below = [line for key, sub in section.model_fields.items() for line in _describe_section(key, sub)]
    return [head, *(f"{'#' if off else ' '} {line}" for line in below)]


def _show(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        value = [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
    return f"{text}   # {field.description}" if field.description else text


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: object) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    # A date that does not exist is a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML ({error})", where=where) from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("cannot read --set", expected="section.key=value", got=override)
    value = _parse_yaml(text, f"--set {key}")
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"--set {key}: there is no {part!r} to set")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {key}: there is no {last!r} to set")

"""What the README promises exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import yaml

from openmm_hvpcg.analysis import SUMMARY_KEYS
from openmm_hvpcg.config import validate_protocol

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_every_summary_key_is_documented_with_its_meaning():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    for key, meaning in SUMMARY_KEYS.items():
        assert rows[key].replace("\\|", "|") == meaning


def test_the_protocol_of_the_readme_is_valid():
    text, *sections = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    protocol = yaml.safe_load(text)
    assert len(validate_protocol(protocol).molecules) == 2
    assert sections
    for section in sections:
        validate_protocol(protocol | yaml.safe_load(section))


def test_the_python_of_the_readme_imports():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        statements = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        ours = [node for node in statements if str(node.module).startswith("openmm_hvpcg")]
        assert ours
        for node in ours:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)

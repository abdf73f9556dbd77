"""The names at the top of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import openmm_hvpcg


def test_every_name_is_there():
    for name in openmm_hvpcg.__all__:
        assert getattr(openmm_hvpcg, name) is not None
        assert name in dir(openmm_hvpcg)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'CGPotentials'"):
        _ = openmm_hvpcg.CGPotentials


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, openmm_hvpcg; print(sorted({'torch', 'openmm', 'mdtraj', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

"""Messages: one line, in the order where, what, expected, got, what to do."""

from __future__ import annotations

import inspect

import pytest

from openmm_hvpcg import errors
from openmm_hvpcg.errors import HVPCGError, UnstableSimulationError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_ours_and_has_an_exit_status(kind: type[HVPCGError]) -> None:
    assert issubclass(kind, HVPCGError)
    assert kind("wrong").exit_status == (1 if kind is UnstableSimulationError else 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "it is wrong"),
        ({"expected": 3, "got": 4}, "it is wrong: expected 3, got 4"),
        ({"expected": 3}, "it is wrong: expected 3"),
        ({"got": 0}, "it is wrong: got 0"),
        ({"where": "a.pdb"}, "a.pdb: it is wrong"),
        ({"hint": "mend it"}, "it is wrong. Mend it"),
        (
            {"expected": (1, 2), "got": "x", "where": "a", "hint": "mend it"},
            "a: it is wrong: expected (1, 2), got x. Mend it",
        ),
    ],
)
def test_message(parts: dict, message: str) -> None:
    assert str(HVPCGError("it is wrong", **parts)) == message


def test_message_is_one_line() -> None:
    text = str(HVPCGError("many\n lines", got="a\n\tb", hint="c\r\nd"))
    assert text == "many lines: got a b. C d"


def test_keeps_its_parts() -> None:
    error = HVPCGError("it is wrong", where="a.pdb", hint="mend it")
    assert (error.problem, error.where) == ("it is wrong", "a.pdb")

"""The package's exceptions.

Every one says what is wrong, what was expected and what was found, where, and what to do, in one line. The
command line prints that line and exits with ``exit_status``: 2 for input that cannot be used, 1 for a run
that failed although its input was sound.
"""

from __future__ import annotations


class HVPCGError(Exception):
    """Base class. Catch it to catch everything this package raises on purpose.

    Parameters
    ----------
    problem : str
        What is wrong, without a full stop.
    expected, got : object, optional
        What would have been right, and what was found.
    where : object, optional
        File, molecule, frame or key the problem lies in.
    hint : str, optional
        What to do about it.
    """

    exit_status = 2

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        where: object = None,
        hint: str | None = None,
    ) -> None:
        message = f"{where}: {problem}" if where is not None else problem
        if expected is not None and got is not None:
            message += f": expected {expected}, got {got}"
        elif expected is not None:
            message += f": expected {expected}"
        elif got is not None:
            message += f": got {got}"
        if hint:
            message += f". {hint[0].upper()}{hint[1:]}"
        super().__init__(" ".join(message.split()))
        self.problem = problem
        self.where = where


class ConfigError(HVPCGError):
    """A protocol YAML or a setting is wrong."""


class InputError(HVPCGError):
    """A structure, topology, trajectory or force field cannot be used."""


class MappingError(HVPCGError):
    """A bead map or force map is not admissible."""


class DataError(HVPCGError):
    """A file of frames or labels is of the wrong kind, version or units, or is damaged."""


class PotentialError(HVPCGError):
    """A potential file is not one, or fails its checks."""


class BackendError(HVPCGError):
    """A platform or backend that was asked for cannot run here."""


class StudyError(HVPCGError):
    """An output folder holds something else, or results of other settings."""


class StorageError(HVPCGError):
    """There is no room, or no permission, to write."""


class UnstableSimulationError(HVPCGError):
    """A simulation blew up: energies or temperature left the physical range."""

    exit_status = 1

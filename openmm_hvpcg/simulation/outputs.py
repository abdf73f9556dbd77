"""What a CG simulation writes while it runs, and how it comes back after a kill.

Frames and log lines are appended in blocks; then the checkpoint is written, whole, with the sizes the files
have. After a kill :func:`load_checkpoint` gives the last one, and :meth:`RunWriter.resume` cuts the files
back to it, so that the finished files are those of an uninterrupted run.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openmm import app

from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.simulation.copies import Snapshot
from openmm_hvpcg.storage import atomic_path, explain_disk_errors
from openmm_hvpcg.units import PS_PER_FS

TOPOLOGY_NAME = "topology.pdb"
ENERGIES_NAME = "energies.csv"
CHECKPOINT_NAME = "checkpoint.npz"
#: Before the name of an array in a checkpoint.
_ARRAY = "array_"


@dataclass(frozen=True)
class Checkpoint:
    """State of a run: OpenMM's checkpoint, the step, the size of each output file, seconds spent so far.

    ``arrays`` is what OpenMM's checkpoint does not hold.
    """

    context: bytes
    step: int
    n_frames: int
    sizes: dict[str, int]
    wall_time_s: float
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the last one, whole or not at all."""
    others: dict[str, Any] = {f"{_ARRAY}{name}": array for name, array in checkpoint.arrays.items()}
    with atomic_path(folder / CHECKPOINT_NAME) as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle,
            context=np.frombuffer(checkpoint.context, dtype=np.uint8),
            counts=np.array([checkpoint.step, checkpoint.n_frames], dtype=np.int64),
            files=np.array(list(checkpoint.sizes), dtype=np.str_),
            sizes=np.array(list(checkpoint.sizes.values()), dtype=np.int64),
            wall_time_s=np.float64(checkpoint.wall_time_s),
            **others,
        )


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint in ``folder``, or None.

    Raises
    ------
    StudyError
        It is damaged, or the files it speaks of are shorter than it says.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            step, n_frames = content["counts"].tolist()
            sizes = dict(zip(content["files"].tolist(), content["sizes"].tolist(), strict=True))
            arrays = {n.removeprefix(_ARRAY): content[n] for n in content.files if n.startswith(_ARRAY)}
            wall_time_s = float(content["wall_time_s"])
            checkpoint = Checkpoint(content["context"].tobytes(), step, n_frames, sizes, wall_time_s, arrays)
    except Exception as error:
        raise StudyError(
            f"the checkpoint is damaged ({error})", where=path, hint="remove the folder and run again"
        ) from error
    for name, size in checkpoint.sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found < size:
            raise StudyError(
                "a file is shorter than the checkpoint says",
                expected=f"{size} bytes",
                got=found,
                where=folder / name,
                hint="remove the folder and run again",
            )
    return checkpoint


def trajectory_names(replicas: int, trajectory_format: str) -> list[str]:
    """File name of each replica's trajectory."""
    return [f"replica_{k:03d}.{trajectory_format}" for k in range(replicas)]


class RunWriter:
    """Trajectories of all replicas and the energy log, written in blocks.

    Parameters
    ----------
    folder : exists
    topology : of one replica
    replicas, trajectory_format, save_every, timestep_fs : as in the settings
    exchange : log the temperature (its index, coldest 0) and the energy of each replica as well
    """

    def __init__(
        self,
        folder: Path,
        topology: app.Topology,
        *,
        replicas: int,
        trajectory_format: str,
        save_every: int,
        timestep_fs: float,
        exchange: bool = False,
    ) -> None:
        self.folder = folder
        self.topology = topology
        self.replicas = replicas
        self.names = trajectory_names(replicas, trajectory_format)
        self.save_every = save_every
        self.timestep_ps = timestep_fs * PS_PER_FS
        self.exchange = exchange
        self.n_frames = 0
        self._frames: list[NDArray] = []
        self._rows: list[str] = []

    def start(self) -> None:
        """Begin anew: empty trajectories, an energy log with its header."""
        names = ["temperature_K", *(("state", "potential_energy_kJ_per_mol") if self.exchange else ())]
        columns = ",".join(f"{name}_{k:03d}" for name in names for k in range(self.replicas))
        with explain_disk_errors(self.folder):
            for name in self.names:
                (self.folder / name).unlink(missing_ok=True)
            header = f"step,time_ps,potential_energy_kJ_per_mol,temperature_K,{columns}\n"
            (self.folder / ENERGIES_NAME).write_text(header, encoding="utf-8")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Cut every file back to what it held when the checkpoint was written."""
        self.n_frames = checkpoint.n_frames
        with explain_disk_errors(self.folder):
            for name in self.names:
                if name not in checkpoint.sizes:
                    (self.folder / name).unlink(missing_ok=True)
            for name, size in checkpoint.sizes.items():
                os.truncate(self.folder / name, size)
                if name.endswith(".dcd"):
                    _set_dcd_frames(self.folder / name, checkpoint.n_frames)

    def add(self, step: int, snapshot: Snapshot, temperatures: NDArray) -> None:
        """Keep a frame, each replica centred, and kinetic temperatures (K,) for the next :meth:`flush`."""
        positions = snapshot.positions
        self._frames.append((positions - positions.mean(axis=1, keepdims=True)).astype(np.float32))
        per_replica = [f"{t:.2f}" for t in temperatures]
        if self.exchange and snapshot.states is not None:
            per_replica += [str(s) for s in snapshot.states.tolist()]
            per_replica += [f"{e:.4f}" for e in snapshot.energies]
        total = snapshot.energies.sum()
        self._rows.append(
            f"{step},{step * self.timestep_ps:.6g},{total:.4f},{temperatures.mean():.2f},{','.join(per_replica)}\n"
        )

    def flush(self) -> dict[str, int]:
        """Append what was kept to the files; returns the size of each, bytes."""
        if self._frames:
            with explain_disk_errors(self.folder):
                for k, name in enumerate(self.names):
                    self._append(self.folder / name, [frame[k] for frame in self._frames])
                with open(self.folder / ENERGIES_NAME, "a", encoding="utf-8") as handle:
                    handle.writelines(self._rows)
        self.n_frames += len(self._frames)
        self._frames, self._rows = [], []
        files = [*self.names, ENERGIES_NAME]
        return {name: (self.folder / name).stat().st_size for name in files if (self.folder / name).exists()}

    def _append(self, path: Path, frames: list[NDArray]) -> None:
        again = path.exists()
        timing = (self.timestep_ps, self.save_every, self.save_every)
        if path.suffix == ".xtc":
            trajectory = app.XTCFile(str(path), self.topology, *timing, append=again)
            for frame in frames:
                trajectory.writeModel(frame)
            return
        with open(path, "r+b" if again else "w+b") as handle:
            dcd = app.DCDFile(handle, self.topology, *timing, append=again)
            for frame in frames:
                dcd.writeModel(frame)


def _set_dcd_frames(path: Path, n_frames: int) -> None:
    """The third word of a DCD file is its number of frames."""
    with open(path, "r+b") as handle:
        handle.seek(8)
        handle.write(struct.pack("<i", n_frames))

"""Labels of the chosen frames, chunk by chunk, by one process or several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.platforms import GPU_PLATFORMS, PlatformChoice
from openmm_hvpcg.config import LabelSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.labels.frame_maps import FrameMaps
from openmm_hvpcg.training.labels.held import Chains
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.parts import Labels, Part, Recipe, label_part
from openmm_hvpcg.training.labels.probes import ProbeLaw, draw_probes
from openmm_hvpcg.training.labels.team import Team

#: Work of one core that is worth other processes, s: they take about half a second to start.
WORTH_A_TEAM_S = 2.0
#: Work that a process is given at a time, s: long beside what sending it costs, short beside the wait for the last one.
PART_S = 0.05
#: Where a Context computes many copies at once: so many calls of all Contexts at a time, or the last ones, which are
#: not full, weigh.
FULL_CALLS = 8


@dataclass(frozen=True)
class Sample:
    """Frames: atom positions (n, A, 3), bead positions (n, B, 3), probes (n, P, B, 3), box (n, 3, 3) or None."""

    positions: NDArray[np.float32]
    beads: NDArray[np.float32]
    probes: NDArray[np.float32]
    box: NDArray[Any] | None


@dataclass(frozen=True)
class LabelJob:
    """What is labelled, with what."""

    system: AtomisticSystem
    frames: Frames
    bead_map: BeadMap
    settings: LabelSettings
    chosen: NDArray[np.int64]
    platform: PlatformChoice
    oracle: ForceOracle

    @property
    def law(self) -> ProbeLaw:
        return ProbeLaw(self.settings.probe_law, self.settings.probe_modes, self.settings.probe_translations)

    def take(self, rows: NDArray[np.int64] | slice, n_probes: int) -> Sample:
        """Some of the chosen frames, with probes."""
        part = self.read(rows, np.zeros(len(self.chosen), dtype=np.int64))
        probes = draw_probes(self.law, part.index, n_probes, self.bead_map.n_beads, self.settings.seed, part.beads)
        return Sample(part.positions, part.beads, probes, part.box)

    def read(self, rows: NDArray[np.int64] | slice, fold: NDArray[np.int64]) -> Part:
        """Some of the chosen frames; ``fold`` is that of all."""
        index = self.chosen[rows]
        positions = self.frames.positions[index]
        beads = self.bead_map.map_positions(positions).astype(np.float32)
        return Part(index, fold[rows], positions, beads, None if self.frames.box is None else self.frames.box[index])

    def count_calls(self) -> int:
        """Force calls that label one frame."""
        n_probes = self.settings.probes_per_frame
        if self.settings.averaging is None:
            return 1 + 2 * n_probes
        return Chains.from_settings(self.settings.averaging, self.system.temperature_K).count_force_calls(n_probes)

    def time_call(self) -> float:
        """Seconds that one Context takes for one configuration: as the platform was chosen by, or else measured now."""
        rate = self.platform.calls_per_second.get(self.platform.name)
        if rate is not None:
            return 1.0 / rate
        box = None if self.frames.box is None else self.frames.box[self.chosen[:1]]
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            self.oracle(self.frames.positions[self.chosen[:1]].astype(np.float64), box)
            seconds.append(time.perf_counter() - began)
        return min(seconds)


@contextlib.contextmanager
def start_team(job: LabelJob, n_frames: int) -> Iterator[Team | None]:
    """Other processes for so many frames still to label, where there is work for them; they end with the block.

    Contexts on one GPU stay in one process, in threads: processes would take turns there.
    """
    n_others = min(job.oracle.n_workers, n_frames) - 1
    if n_others < 1 or job.settings.averaging is not None or job.platform.name in GPU_PLATFORMS:
        yield None
        return
    seconds = job.time_call() * job.count_calls()
    if seconds * n_frames < WORTH_A_TEAM_S:
        yield None
        return
    with Team(n_others, job.system.system, job.platform.name, job.platform.properties) as team:
        team.frames_at_once = max(1, int(PART_S / seconds))
        yield team


def compute_chunks(
    job: LabelJob, maps: FrameMaps, chunks: Sequence[slice], step_nm: float, team: Team | None
) -> Iterator[tuple[slice, Labels]]:
    """Labels of the frames in each of some disjoint slices of the chosen ones, in any order."""
    settings = job.settings
    recipe = Recipe(job.law, settings.probes_per_frame, settings.seed, step_nm, maps.weights)
    if team is None:
        for run in _group(job, chunks):
            part = job.read(np.concatenate([np.arange(c.start, c.stop) for c in run]), maps.fold)
            yield from _split(label_part(job.oracle, recipe, part), run)
        return
    parts = _cut(job, maps, chunks, team.frames_at_once)
    with ForceOracle(job.system.system, job.platform.name, job.platform.properties) as oracle:
        yield from _join(team.label(recipe, parts, oracle), chunks)


def _group(job: LabelJob, chunks: Sequence[slice]) -> Iterator[Sequence[slice]]:
    """As many chunks at a time as fill the Contexts: one, but where a Context computes many copies at once."""
    wanted = FULL_CALLS * job.oracle.n_copies * job.oracle.n_workers if job.oracle.n_copies > 1 else 1
    size = -(-wanted // (max((c.stop - c.start for c in chunks), default=1) * 2 * job.settings.probes_per_frame))
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]


def _split(labels: Labels, chunks: Sequence[slice]) -> Iterator[tuple[slice, Labels]]:
    """Labels of chunks that were computed together."""
    start = 0
    for rows in chunks:
        stop = start + rows.stop - rows.start
        yield rows, {name: values[start:stop] for name, values in labels.items()}
        start = stop


def _cut(job: LabelJob, maps: FrameMaps, chunks: Sequence[slice], size: int) -> Iterator[tuple[slice, Part]]:
    """Chunks in pieces of at most ``size`` frames."""
    for rows in chunks:
        whole = job.read(rows, maps.fold)
        for start in range(rows.start, rows.stop, size):
            stop = min(start + size, rows.stop)
            yield slice(start, stop), whole.select(slice(start - rows.start, stop - rows.start))


def _join(pieces: Iterator[tuple[slice, Labels]], chunks: Sequence[slice]) -> Iterator[tuple[slice, Labels]]:
    """Chunks from their pieces, each when its last piece has come."""
    owner = {row: chunk for chunk in chunks for row in range(chunk.start, chunk.stop)}
    waiting: dict[int, list[tuple[slice, Labels]]] = {}
    for rows, labels in pieces:
        chunk = owner[rows.start]
        have = waiting.setdefault(chunk.start, [])
        have.append((rows, labels))
        if sum(r.stop - r.start for r, _ in have) == chunk.stop - chunk.start:
            ordered = [values for _, values in sorted(waiting.pop(chunk.start), key=lambda piece: piece[0].start)]
            yield chunk, {name: np.concatenate([values[name] for values in ordered]) for name in labels}

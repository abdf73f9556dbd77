"""Labels by several processes, and how they get to disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openmm
import pytest

from openmm_hvpcg.atomistic import platforms
from openmm_hvpcg.atomistic.platforms import choose_platform, read_forces
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.errors import BackendError, InputError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.labels import hvp, job, label, team
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.label import CHUNK_FRAMES, label_frames
from openmm_hvpcg.training.labels.oracle import ForceOracle

SETTINGS = LabelSettings(probes_per_frame=2, platform="Reference", workers=1, seed=7)
N_FRAMES = 2 * CHUNK_FRAMES + 21


@pytest.fixture(scope="module")
def alanine():
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, name="ala")


@pytest.fixture(scope="module")
def bead_map(alanine):
    return build_bead_map("backbone", alanine.topology)


@pytest.fixture
def eager(monkeypatch):
    """Processes are started whatever there is to do, and get 10 frames at a time."""
    monkeypatch.setattr(job, "WORTH_A_TEAM_S", 0.0)
    monkeypatch.setattr(job.LabelJob, "time_call", lambda self: job.PART_S / 50 / 1.001)
    started = []
    genuine = team._start_member
    monkeypatch.setattr(team, "_start_member", lambda: started.append(genuine()) or started[-1])
    return started


def build_frames(system, n_frames: int = N_FRAMES) -> Frames:
    noise = 0.003 * np.random.default_rng(0).standard_normal((n_frames, system.n_atoms, 3))
    return Frames((system.positions + noise).astype(np.float32), system.topology, 300.0, np.zeros(n_frames, dtype=int))


def read_files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_do_not_change_a_byte(alanine, bead_map, tmp_path, eager, workers):
    settings = SETTINGS.model_copy(update={"workers": workers})
    others = []
    genuine = team.Team._collect

    def collect(self, recipe, parts, timeout):
        # Nobody is overtaken by this process: the others take their share however busy the machine is.
        found = genuine(self, recipe, parts, timeout if all(m.begun for m in self._members) else None)
        others.extend(rows for rows, _ in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team.Team, "_collect", collect)
        label_frames(alanine, build_frames(alanine), bead_map, settings, tmp_path / "many.zarr", progress=False)
    assert len(eager) == workers - 1
    assert others
    assert max(rows.stop - rows.start for rows in others) == 10
    assert all(member.process.returncode is not None for member in eager)
    label_frames(alanine, build_frames(alanine), bead_map, SETTINGS, tmp_path / "one.zarr", progress=False)
    assert len(eager) == workers - 1
    many, one = read_files(tmp_path / "many.zarr"), read_files(tmp_path / "one.zarr")
    # The header names the number of workers.
    assert many.pop("zarr.json") != one.pop("zarr.json")
    assert many == one


@pytest.mark.parametrize("workers", [1, 2])
def test_overlapping_atoms_are_named_by_their_frame(alanine, bead_map, tmp_path, eager, monkeypatch, workers):
    frames = build_frames(alanine)
    frames.positions[100, 3] = frames.positions[100, 12]
    monkeypatch.setattr(label, "FORCE_MAP_FRAMES", 2)
    settings = SETTINGS.model_copy(update={"workers": workers, "force_map": "harmonic"})
    with pytest.raises(InputError, match=r"^frame 100: forces of configuration 0 are not finite"):
        label_frames(alanine, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)
    assert all(member.process.returncode is not None for member in eager)


def test_error_of_another_process_comes_through(alanine, bead_map, tmp_path, eager, monkeypatch):
    frames = build_frames(alanine)
    frames.positions[100, 3] = frames.positions[100, 12]
    monkeypatch.setattr(label, "FORCE_MAP_FRAMES", 2)
    # This process takes no part of its own.
    monkeypatch.setattr(job, "label_part", None)
    genuine = team.Team.label

    def leave_to_others(self, recipe, parts, force_function):
        yield from self._collect(recipe, parts, None)
        while any(member.pending for member in self._members):
            yield from self._collect(recipe, parts, None)
        yield from genuine(self, recipe, iter(()), force_function)

    monkeypatch.setattr(team.Team, "label", leave_to_others)
    settings = SETTINGS.model_copy(update={"workers": 2, "force_map": "harmonic"})
    with pytest.raises(InputError, match=r"^frame 100: forces of configuration 0 are not finite"):
        label_frames(alanine, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)


def test_death_of_a_process_is_told_and_the_rest_is_kept(alanine, bead_map, tmp_path, eager, monkeypatch):
    settings = SETTINGS.model_copy(update={"workers": 2})
    genuine = team.Team._begin

    def begin(self, member, recipe):
        genuine(self, member, recipe)
        member.process.kill()
        member.process.wait()

    path = tmp_path / "x.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(team.Team, "_begin", begin)
        # This process waits for the other one before it labels.
        patch.setattr(team, "wait", lambda connections, timeout: genuine_wait(connections, None))
        with pytest.raises(BackendError, match=r"ended on its own \(exit status -9\)"):
            label_frames(alanine, build_frames(alanine), bead_map, settings, path, progress=False)
    data = label_frames(alanine, build_frames(alanine), bead_map, settings, path, progress=False)
    one = label_frames(alanine, build_frames(alanine), bead_map, SETTINGS, tmp_path / "one.zarr", progress=False)
    assert data.hash == one.hash


genuine_wait = team.wait


def test_processes_end_with_the_one_that_was_killed(tmp_path):
    """In a script without ``if __name__``, which a process that imported it again would run for ever."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_labels_team as t
t.job.WORTH_A_TEAM_S = 0.0
start = t.team._start_member
t.team._start_member = lambda: print((member := start()).process.pid, flush=True) or member
begin = t.team.Team._begin
t.team.Team._begin = lambda *a: (begin(*a), print("begun", flush=True))
system = t.build_atomistic_system(t.InputSettings(sequence="A"), temperature_K=300.0, name="ala")
bead_map = t.build_bead_map("backbone", system.topology)
settings = t.SETTINGS.model_copy(update={{"workers": 3}})
t.label_frames(system, t.build_frames(system, 60000), bead_map, settings, {str(tmp_path / "x.zarr")!r}, progress=False)
""")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline().strip() for _ in range(4)]
        pids = [int(line) for line in lines if line.isdecimal()]
        assert len(pids) == lines.count("begun") == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    """Zombies, which nobody waits for in a container without an init, are not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_forces_without_units_are_those_with_them(alanine, platform):
    # Several threads add up in any order.
    properties = {"Threads": "1"} if platform == "CPU" else {}
    context = openmm.Context(
        alanine.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform), properties
    )
    context.setPositions(alanine.positions)
    forces = np.full((2, alanine.n_atoms, 3), np.nan)
    read_forces(context, forces[1])
    np.testing.assert_array_equal(forces[1], context.getState(getForces=True).getForces(asNumpy=True)._value)
    assert np.isnan(forces[0]).all()


def test_hvps_do_not_depend_on_how_many_are_in_memory(alanine, bead_map, monkeypatch):
    rng = np.random.default_rng(0)
    positions = build_frames(alanine, 7).positions
    probes = rng.standard_normal((7, 3, bead_map.n_beads, 3))
    weights = rng.standard_normal((bead_map.n_beads, alanine.n_atoms))
    sizes = []
    with ForceOracle(alanine.system, "Reference") as oracle:

        def count(x, box):
            sizes.append(len(x))
            return oracle(x, box)

        whole = compute_projected_hvps(count, positions, probes, weights, 1e-5)
        monkeypatch.setattr(hvp, "BLOCK_BYTES", 2 * 6 * 24 * alanine.n_atoms)
        np.testing.assert_array_equal(compute_projected_hvps(count, positions, probes, weights, 1e-5), whole)
    assert sizes == [42, 12, 12, 12, 6]


def test_each_configuration_has_its_own_box(alanine):
    system = openmm.System()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.9)
    for charge in (1.0, -1.0):
        system.addParticle(10.0)
        force.addParticle(charge, 0.2, 0.5)
    system.addForce(force)
    edges = np.array([2.0, 2.0, 2.2, 2.2, 2.0])
    boxes = edges[:, None, None] * np.eye(3)
    # Neighbours across the boundary: their distance is the edge's to tell.
    positions = np.repeat([[[0.1, 0.0, 0.0], [1.7, 0.0, 0.0]]], 5, axis=0)
    with ForceOracle(system, "Reference") as oracle:
        together = oracle(positions, boxes)
        alone = [oracle(positions[k : k + 1], boxes[k : k + 1])[0] for k in (0, 2, 4)]
    np.testing.assert_array_equal(together, [alone[0], alone[0], alone[1], alone[1], alone[2]])
    assert abs(together[0] - together[2]).max() > 1.0


def test_chunks_are_computed_together_where_a_context_takes_many_copies(alanine, bead_map, tmp_path, monkeypatch):
    plain = label_frames(alanine, build_frames(alanine), bead_map, SETTINGS, tmp_path / "one.zarr", progress=False)
    monkeypatch.setattr(label, "count_copies", lambda system, platform: 16)
    monkeypatch.setattr(job, "FULL_CALLS", 30)
    sizes = []
    genuine = ForceOracle.__call__
    monkeypatch.setattr(
        ForceOracle, "__call__", lambda self, x, box=None: (sizes.append(len(x)), genuine(self, x, box))[1]
    )
    data = label_frames(alanine, build_frames(alanine), bead_map, SETTINGS, tmp_path / "many.zarr", progress=False)
    # 30 x 16 calls fill the Contexts: two chunks of 64 frames, two probes, two calls.
    assert 2 * CHUNK_FRAMES in sizes
    # Molecules stand tens of nm out: 1e-15 of that against steps of 1e-6 nm and up, and the maps' fit.
    np.testing.assert_allclose(data.forces, plain.forces, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(data.hvps, plain.hvps, atol=1e-5 * np.abs(plain.hvps).max())


def test_platform_is_not_judged_by_one_bad_moment(alanine, monkeypatch):
    turns: dict[str, int] = {}

    def measure(self, name, properties):
        turns[name] = turns.get(name, 0) + 1
        # Something else runs while CPU has its first turn.
        rate = 100.0 if name == "Reference" else 10.0 if turns[name] == 1 else 200.0
        return rate, np.ones((alanine.n_atoms, 3))

    monkeypatch.setattr(platforms._Probe, "measure", measure)
    choice = choose_platform(alanine.system, alanine.positions, purpose="labels", threads=1)
    assert choice.calls_per_second["CPU"] == 200.0
    assert choice.name != "Reference"

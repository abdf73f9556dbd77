"""CGPotential: Systems on both backends, with both kinds of priors, of one and of many copies."""

from __future__ import annotations

import builtins
import itertools
from dataclasses import replace
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import app
from simulation_cases import (
    BONDS,
    BRANCHED,
    build_frames,
    build_molecule,
    build_potential,
    build_priors,
    save_example,
)

from openmm_hvpcg.cores import choose_torch_threads, count_cores
from openmm_hvpcg.errors import BackendError, InputError, PotentialError
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation.backends import evaluate_script
from openmm_hvpcg.simulation.check import evaluate_system
from openmm_hvpcg.simulation.native_priors import PRIOR_GROUPS
from openmm_hvpcg.simulation.serialization import (
    deserialize_system,
    load_system,
    save_system,
    serialize_system,
)
from openmm_hvpcg.simulation.system import CGPotential

# All sides see float64 positions and run the same float32 network; the sums may be ordered differently.
FLOAT32 = 1e-5
# Native and torch priors are both computed in float64.
FLOAT64 = 1e-10


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("priors", ["native", "torch"])
@pytest.mark.parametrize("backend", ["torchforce", "pythonforce"])
def test_every_backend_equals_the_script(backend: str, priors: str) -> None:
    potential, frames = build_potential(), build_frames(4)
    energies, forces = evaluate_system(potential.createSystem(backend=backend, priors=priors), frames)
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        expected_energy, expected = evaluate_script(potential.script, frame)
        assert energy == pytest.approx(expected_energy, rel=FLOAT32)
        np.testing.assert_allclose(force, expected, atol=FLOAT32 * rms(expected))


@pytest.mark.parametrize("term", ["bonds", "angles", "dihedrals", "impropers", "repulsion"])
def test_each_native_prior_equals_its_torch_form(term: str) -> None:
    everything = build_priors()
    only = PriorParameters(**{term: getattr(everything, term)}, repulsion_epsilon=everything.repulsion_epsilon)
    potential = build_potential(priors=only, energy_scale=0.0)
    frames = build_frames(6)
    frames[:, 5] = 0.5 * (frames[:, 0] + frames[:, 5])  # brings pairs within sigma
    native = potential.createSystem(backend="pythonforce", priors="native")
    assert [force.getName() for force in native.getForces()] == ["network", term]
    energies, forces = evaluate_system(native, frames, {PRIOR_GROUPS[term]})
    assert rms(forces) > 1.0, "the term must act on these frames for the comparison to mean anything"
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        expected_energy, expected = evaluate_script(potential.script, frame)
        assert energy == pytest.approx(expected_energy, rel=FLOAT64, abs=1e-9)
        np.testing.assert_allclose(force, expected, atol=FLOAT64 * max(1.0, rms(expected)) * 10)


def test_dihedrals_keep_their_sign() -> None:
    """Mirror images differ in the sine terms and the improper: a wrong sign convention cannot hide."""
    potential = build_potential(energy_scale=0.0)
    frames = build_frames(3)
    mirrored = frames * np.array([1.0, 1.0, -1.0])
    native = potential.createSystem(backend="pythonforce", priors="native")
    original, reflected = evaluate_system(native, frames)[0], evaluate_system(native, mirrored)[0]
    assert np.abs(original - reflected).min() > 0.1
    expected = [evaluate_script(potential.script, frame)[0] for frame in mirrored]
    np.testing.assert_allclose(reflected, expected, rtol=FLOAT32)


@pytest.mark.parametrize("backend", ["torchforce", "pythonforce"])
def test_replicas_equal_single_runs(backend: str) -> None:
    potential, frames = build_potential(), build_frames(5)
    # Copies on top of each other: any interaction between them would be strong.
    frames -= frames.mean(axis=1, keepdims=True)
    single_energies, single_forces = evaluate_system(potential.createSystem(backend=backend), frames)
    system = potential.createSystem(replicas=5, backend=backend)
    energies, forces = evaluate_system(system, frames.reshape(1, -1, 3))
    assert energies[0] == pytest.approx(single_energies.sum(), rel=FLOAT32)
    np.testing.assert_allclose(forces.reshape(single_forces.shape), single_forces, atol=FLOAT32 * rms(single_forces))


def test_system_has_masses_groups_and_nothing_else() -> None:
    potential = build_potential()
    system = potential.createSystem(replicas=3)
    masses = [system.getParticleMass(i).value_in_unit(openmm.unit.dalton) for i in range(18)]
    np.testing.assert_allclose(masses, np.tile(potential.spec.bead_map.masses, 3))
    found = {force.getName(): force.getForceGroup() for force in system.getForces()}
    assert found == {"network": 1, **PRIOR_GROUPS}
    assert not system.usesPeriodicBoundaryConditions()


def test_create_system_leaves_the_potential_alone() -> None:
    potential, frames = build_potential(), build_frames(1)
    before = evaluate_script(potential.script, frames[0])[0]
    potential.createSystem(build_molecule("ABC", [[0, 1], [1, 2]]), priors="native")
    assert evaluate_script(potential.script, frames[0])[0] == before


@pytest.mark.parametrize("backend", ["torchforce", "pythonforce"])
def test_xml_round_trip(backend: str, tmp_path: Path) -> None:
    potential, frames = build_potential(), build_frames(2)
    system = potential.createSystem(replicas=2, backend=backend)
    save_system(system, tmp_path / "system.xml")
    back = load_system(tmp_path / "system.xml")
    assert [(f.getName(), f.getForceGroup()) for f in back.getForces()] == [
        (f.getName(), f.getForceGroup()) for f in system.getForces()
    ]
    flat = frames.reshape(1, -1, 3)
    energies, forces = evaluate_system(system, flat)
    back_energies, back_forces = evaluate_system(back, flat)
    assert back_energies[0] == pytest.approx(energies[0], rel=FLOAT32)
    np.testing.assert_allclose(back_forces, forces, atol=FLOAT32 * rms(forces))
    assert serialize_system(back).count("<Force ") == serialize_system(system).count("<Force ")


def test_xml_keeps_parameters_and_place_of_a_torch_force() -> None:
    from openmmtorch import TorchForce

    system = build_potential().createSystem(backend="torchforce")
    force = TorchForce.cast(system.getForce(0))
    force.addGlobalParameter("scale", 1.5)
    force.addEnergyParameterDerivative("scale")
    force.setProperty("useCUDAGraphs", "false")
    force.setForceGroup(9)
    restored = deserialize_system(serialize_system(system))
    back = restored.getForce(0)
    assert back.getForceGroup() == 9
    torch_force = TorchForce.cast(back)
    assert torch_force.getGlobalParameterName(0) == "scale"
    assert torch_force.getGlobalParameterDefaultValue(0) == 1.5
    assert torch_force.getEnergyParameterDerivativeName(0) == "scale"
    assert dict(torch_force.getProperties())["useCUDAGraphs"] == "false"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not xml",
        "<State/>",
        "<System><Forces/></System>",
        "<System type='System' version='99'><Forces/></System>",
    ],
)
def test_xml_that_is_no_system(text: str) -> None:
    with pytest.raises(InputError, match=r"XML|System"):
        deserialize_system(text, where="x.xml")


def test_xml_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.xml"):
        load_system(tmp_path / "none.xml")
    text = serialize_system(build_potential().createSystem(backend="torchforce"))
    start = text.index('encodedFileContents="') + len('encodedFileContents="')
    with pytest.raises(InputError, match="damaged"):
        deserialize_system(text[: start + 100] + text[text.index('"', start) :])


def build_cg_topology(names: list[tuple[str, str]]) -> md.Topology:
    topology = md.Topology()
    chain = topology.add_chain()
    atoms = []
    for number, (residue, name) in enumerate(names, start=1):
        added = topology.add_residue(residue, chain, resSeq=number)
        atoms.append(topology.add_atom(name, md.element.carbon, added))
    for a, b in itertools.pairwise(atoms):
        topology.add_bond(a, b)
    return topology


@pytest.mark.parametrize("kind", ["mdtraj", "openmm", "beadmap"])
def test_another_molecule_by_topology(kind: str) -> None:
    """Chain A-B-B-C given in three ways; BB at GLY is found by residue, because GLY has one species only."""
    potential = build_potential()
    topology = build_cg_topology([("ALA", "CA"), ("GLY", "BB"), ("SER", "CB"), ("SER", "CA")])
    molecule = potential.resolve_molecule(topology)
    assert molecule.species == ("A", "B", "B", "C")
    np.testing.assert_allclose(molecule.masses, [12.0, 15.0, 15.0, 20.0])
    given = {"mdtraj": topology, "openmm": topology.to_openmm(), "beadmap": molecule}[kind]
    frames = build_frames(2, molecule)
    native = evaluate_system(potential.createSystem(given, priors="native"), frames)
    torch_side = evaluate_system(potential.createSystem(given, priors="torch"), frames)
    np.testing.assert_allclose(native[0], torch_side[0], rtol=FLOAT32)
    np.testing.assert_allclose(native[1], torch_side[1], atol=FLOAT32 * rms(native[1]))


def test_ends_of_a_chain_are_found_by_their_mark() -> None:
    """A potential of maps with ends: the same residue is another species at an end of a chain, else its plain one."""
    potential = build_potential()
    spec = replace(potential.spec, sites={"ALA:CA": "A", "N-ALA:CA": "B", "C-ALA:CA": "C"})
    chain = build_cg_topology([("ALA", "CA")] * 4)
    assert CGPotential(potential.script, spec).resolve_molecule(chain).species == ("B", "A", "A", "C")
    # A potential without species for ends takes no notice of them.
    assert potential.resolve_molecule(chain).species == ("A",) * 4


def test_unknown_bead_is_named() -> None:
    topology = build_cg_topology([("ALA", "CA"), ("TRP", "CA")])
    with pytest.raises(PotentialError, match="TRP2:CA"):
        build_potential().createSystem(topology)
    # SER has two species, so the residue alone does not decide.
    with pytest.raises(PotentialError, match="SER1:XX"):
        build_potential().createSystem(build_cg_topology([("SER", "XX")]))


@pytest.mark.parametrize("replicas", [1, 3])
def test_topology_has_the_bonds_of_every_copy(replicas: int) -> None:
    topology = build_potential().createTopology(replicas=replicas)
    assert isinstance(topology, app.Topology)
    assert topology.getNumAtoms() == replicas * len(BRANCHED)
    found = sorted(sorted((b.atom1.index, b.atom2.index)) for b in topology.bonds())
    expected = sorted([i + 6 * k, j + 6 * k] for k in range(replicas) for i, j in BONDS)
    assert found == expected


def test_loads_from_a_file(tmp_path: Path) -> None:
    path = save_example(tmp_path / "potential.pt")
    potential = CGPotential.load(path)
    frame = build_frames(1)
    np.testing.assert_allclose(
        evaluate_system(potential.createSystem(), frame)[0],
        evaluate_system(build_potential().createSystem(), frame)[0],
        rtol=FLOAT32,
    )
    assert potential.hash == CGPotential.load(path).hash


@pytest.mark.parametrize("options", [{"replicas": 0}, {"replicas": 1.5}, {"priors": "none"}, {"topology": "a.pdb"}])
def test_refused_arguments(options: dict) -> None:
    with pytest.raises(InputError):
        build_potential().createSystem(**options)


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="torchforce"):
        build_potential().createSystem(backend="jax")


def test_openmmtorch_that_cannot_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    genuine = builtins.__import__

    def refuse(name: str, *args: object, **options: object) -> object:
        if name == "openmmtorch":
            raise ImportError("libtorch_cuda.so: cannot open shared object file")
        return genuine(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendError, match=r"libtorch_cuda.*backend=pythonforce"):
        build_potential().createSystem(backend="torchforce")
    system = build_potential().createSystem(backend="auto")
    assert isinstance(system.getForce(0), openmm.PythonForce)
    assert "PythonForce serves instead" in caplog.text


def test_threads_grow_with_the_work_and_stop_at_the_cores() -> None:
    assert choose_torch_threads(6, 8) == 1
    assert choose_torch_threads(500, 500) == count_cores()

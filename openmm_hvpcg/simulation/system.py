"""From a potential file to an ``openmm.System``: :class:`CGPotential`, used like OpenMM's ``ForceField``.

A potential file is enough: no training code is needed to run it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import mdtraj as md
import numpy as np
import openmm
import torch
from openmm import app

from openmm_hvpcg.errors import HVPCGError, InputError, PotentialError
from openmm_hvpcg.mapping import BeadMap, find_end_marks, identify_residue
from openmm_hvpcg.potential import PotentialSpec, bind_molecule, load_potential
from openmm_hvpcg.simulation.backends import build_network_force, clone_script, dump_script
from openmm_hvpcg.simulation.native_priors import build_prior_forces
from openmm_hvpcg.storage import PathLike, compute_hash, hash_file

#: What :meth:`CGPotential.createSystem` takes for a molecule; None is the one the potential file is bound to.
CGTopology: TypeAlias = BeadMap | md.Topology | app.Topology | None


class CGPotential:
    """A trained potential, ready to make OpenMM Systems.

    Parameters
    ----------
    script : TorchScript, positions (K*B, 3) nm -> energy kJ/mol; see :mod:`openmm_hvpcg.potential`
    spec : what belongs to it
    path : the file it came from, for messages

    Examples
    --------
    >>> potential = CGPotential.load("models/fm/potential.pt")      # doctest: +SKIP
    >>> system = potential.createSystem(replicas=8)                 # doctest: +SKIP
    """

    def __init__(self, script: torch.jit.ScriptModule, spec: PotentialSpec, path: PathLike | None = None) -> None:
        self.script = script
        self.spec = spec
        self.path = None if path is None else Path(path)

    @classmethod
    def load(cls, path: PathLike) -> CGPotential:
        """Read a potential file; raises :class:`PotentialError` if it is not one."""
        return cls(*load_potential(path), path=path)

    @property
    def hash(self) -> str:
        """Identifies the potential: of its file, or of script and spec where it has none."""
        if self.path is not None:
            return hash_file(self.path)
        return compute_hash(dump_script(self.script), self.spec.to_json())

    def resolve_molecule(self, topology: CGTopology = None) -> BeadMap:
        """The molecule ``topology`` means, as a bead map that this potential has species and masses for.

        Raises
        ------
        PotentialError
            A bead is of no species this potential knows; it is named.
        """
        if topology is None:
            return self.spec.bead_map
        if isinstance(topology, BeadMap):
            return topology
        if isinstance(topology, app.Topology):
            topology = md.Topology.from_openmm(topology)
        if not isinstance(topology, md.Topology):
            raise InputError(
                "not a topology",
                expected="BeadMap, mdtraj.Topology or openmm.app.Topology",
                got=type(topology).__name__,
            )
        return _read_topology(self.spec, topology)

    def bind(self, topology: CGTopology = None) -> tuple[torch.jit.ScriptModule, BeadMap]:
        """A copy of the script bound to the molecule, and the molecule."""
        molecule = self.resolve_molecule(topology)
        script = clone_script(self.script)
        if topology is not None:
            bind_molecule(script, self.spec, molecule)
        return script, molecule

    def createSystem(
        self, topology: CGTopology = None, replicas: int = 1, backend: str = "auto", priors: str = "native"
    ) -> openmm.System:
        """A System of ``replicas`` independent copies: bead b of copy k is particle ``k*B + b``.

        The network is one force (group 1) and one batched call for all copies. Each native prior is a force
        with a name and a group of its own (:data:`~openmm_hvpcg.simulation.native_priors.PRIOR_GROUPS`), so
        that energies can be taken apart. There is no CMMotionRemover: one that acts on all copies at once
        would couple them.

        Parameters
        ----------
        topology : None for the molecule of the file; or a bead map or topology of beads of known species
        replicas : number of copies
        backend : ``torchforce``, ``pythonforce``, or ``auto``: TorchForce where it can load
        priors : ``native``: OpenMM forces; ``torch``: inside the script

        Raises
        ------
        PotentialError
            An unknown species, or a bonded combination without parameters.
        BackendError
            The backend cannot run here.
        """
        if priors not in ("native", "torch"):
            raise InputError("no such kind of priors", expected="native or torch", got=repr(priors))
        _check_replicas(replicas)
        script, molecule = self.bind(topology)
        script.include_priors = priors == "torch"
        system = openmm.System()
        for mass in np.tile(molecule.masses, replicas):
            system.addParticle(float(mass))
        system.addForce(build_network_force(script, backend))
        if priors == "native":
            for force in build_prior_forces(self.spec.compute_terms(molecule), molecule.n_beads, replicas):
                system.addForce(force)
        return system

    def createTopology(self, topology: CGTopology = None, replicas: int = 1) -> app.Topology:
        """The OpenMM topology, with bonds, of the System :meth:`createSystem` makes of these arguments."""
        _check_replicas(replicas)
        one = self.resolve_molecule(topology).to_topology()
        joined = one
        for _ in range(replicas - 1):
            joined = joined.join(one, keep_resSeq=True)
        return joined.to_openmm()


def load_any_potential(potential: CGPotential | PathLike) -> CGPotential:
    """The potential itself, or the one in a file."""
    return potential if isinstance(potential, CGPotential) else CGPotential.load(potential)


def _check_replicas(replicas: int) -> None:
    if not isinstance(replicas, int | np.integer) or replicas < 1:
        raise InputError("replicas must be a positive whole number", got=repr(replicas))


def _read_topology(spec: PotentialSpec, topology: md.Topology) -> BeadMap:
    """A topology of beads as a bead map: species by site, masses by species, bonds as they are."""
    if topology.n_atoms == 0:
        raise InputError("the topology holds no beads")
    residues = [identify_residue(a) for a in topology.atoms]
    species = [
        find_species(spec, atom.residue.name, atom.name, mark)
        for atom, mark in zip(topology.atoms, find_end_marks(residues), strict=True)
    ]
    unknown = [
        f"{atom.residue.name}{atom.residue.resSeq}:{atom.name}"
        for atom, kind in zip(topology.atoms, species, strict=True)
        if kind is None or kind not in spec.species_masses
    ]
    if unknown:
        raise PotentialError(
            f"the potential knows no species for bead {', '.join(unknown[:5])}",
            expected=f"one of {', '.join(sorted(spec.sites))}" if spec.sites else "a bead map: the file lists no sites",
            hint="train on molecules that hold such beads, or give a BeadMap that names species",
        )
    kinds: list[Any] = species
    try:
        return BeadMap(
            np.eye(topology.n_atoms),
            tuple(kinds),
            np.array([spec.species_masses[kind] for kind in kinds]),
            np.array([(a.index, b.index) for a, b in topology.bonds], dtype=np.int64).reshape(-1, 2),
            tuple(atom.name for atom in topology.atoms),
            tuple(residues),
        )
    except HVPCGError as error:
        raise InputError(f"the topology does not make a molecule of beads ({error})") from error


def find_species(spec: PotentialSpec, residue: str, name: str, mark: str = "") -> str | None:
    """Species of a bead: by ``RESIDUE:NAME``, with the ``mark`` of a chain's end first, else by residue where that has
    one species; None if unknown."""
    for key in (f"{mark}{residue}:{name}", f"{residue}:{name}", residue):
        if key in spec.sites:
            return spec.sites[key]
    of_residue = {kind for key, kind in spec.sites.items() if key.split(":")[0] == residue}
    return of_residue.pop() if len(of_residue) == 1 else None

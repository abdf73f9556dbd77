"""Bead maps: presets, JSON, algebra, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openmm_hvpcg.atomistic.peptides import build_peptide
from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.mapping import BeadMap, build_bead_map, check_species, contract_bonds

DIALANINE = Path(__file__).resolve().parents[2] / "data" / "dialanine.pdb"


def build_topology(sequence: str) -> md.Topology:
    return md.Topology.from_openmm(build_peptide(sequence)[0])


@pytest.fixture(scope="module")
def trajectory() -> md.Trajectory:
    return md.load(str(DIALANINE))


@pytest.fixture(scope="module")
def topology(trajectory: md.Trajectory) -> md.Topology:
    return trajectory.topology


#: Two water-like groups as centres of mass, and one atom alone.
WATER = [15.999, 1.008, 1.008]
CENTRES: dict[str, Any] = {
    "beads": [
        {
            "name": "W1",
            "species": "W",
            "mass_amu": 18.015,
            "atoms": [0, 1, 2],
            "weights": [m / sum(WATER) for m in WATER],
        },
        {
            "name": "W2",
            "species": "W",
            "mass_amu": 18.015,
            "atoms": [5, 4, 3],
            "weights": [m / sum(WATER) for m in WATER],
        },
        {"name": "X", "species": "ION", "mass_amu": 22.99, "atoms": [6], "weights": [1.0]},
    ],
    "bonds": [[1, 0]],
}


def change_centres(**changes: Any) -> dict[str, Any]:
    """``CENTRES`` with fields of its first bead changed; None drops one."""
    content = json.loads(json.dumps(CENTRES))
    for key, value in changes.items():
        if value is None:
            del content["beads"][0][key]
        else:
            content["beads"][0][key] = value
    return content


def build_chain_map(**changes: Any) -> BeadMap:
    fields: dict[str, Any] = {
        "site_weights": np.eye(3, 5),
        "species": ("A", "B", "A"),
        "masses": np.array([1.0, 2.0, 3.0]),
        "bonds": np.array([[0, 1], [1, 2]]),
        "names": ("a", "b", "c"),
        "residues": (("R", 1, 0), ("R", 2, 0), ("S", 1, 1)),
    }
    return BeadMap(**{**fields, **changes})


class TestPresets:
    def test_ca(self, topology: md.Topology) -> None:
        bead_map = build_bead_map("ca", topology)
        assert bead_map.species == ("ALA", "ALA")
        assert bead_map.names == ("CA", "CA")
        assert [r[1] for r in bead_map.residues] == [2, 3]
        assert bead_map.bonds.tolist() == [[0, 1]]
        assert bead_map.masses == pytest.approx([12.011, 12.011], abs=1e-3)  # carbon, in mdtraj's digits

    def test_backbone_takes_of_the_caps_only_what_is_backbone(self, topology: md.Topology) -> None:
        bead_map = build_bead_map("backbone", topology)
        alanine = [f"ALA:{name}" for name in ("N", "CA", "C", "O", "CB")]
        assert list(bead_map.species) == ["ACE:C", "ACE:O", *alanine, *alanine, "NME:N"]
        names = [f"{r[1]}{n}" for r, n in zip(bead_map.residues, bead_map.names, strict=True)]
        assert {f"{names[i]}-{names[j]}" for i, j in bead_map.bonds} == {
            *("1C-1O", "1C-2N", "2N-2CA", "2CA-2C", "2CA-2CB", "2C-2O", "2C-3N"),
            *("3N-3CA", "3CA-3C", "3CA-3CB", "3C-3O", "3C-4N"),
        }

    def test_heavy(self, topology: md.Topology) -> None:
        bead_map = build_bead_map("heavy", topology)
        heavy = [a for a in topology.atoms if a.element.symbol != "H"]
        assert list(bead_map.names) == [a.name for a in heavy]
        chemical = [(a.index, b.index) for a, b in topology.bonds if "H" not in (a.element.symbol, b.element.symbol)]
        assert len(bead_map.bonds) == len(chemical)

    def test_preset_equals_its_selection(self, topology: md.Topology) -> None:
        preset, selection = build_bead_map("ca", topology), build_bead_map("name CA", topology)
        assert np.array_equal(preset.site_weights, selection.site_weights)
        assert selection.species == ("ALA:CA", "ALA:CA")

    def test_proline_ring_and_disulfide(self) -> None:
        proline = build_bead_map("ca", build_topology("APA"))
        assert proline.species == ("ALA", "PRO", "ALA")
        assert proline.bonds.tolist() == [[0, 1], [1, 2]]
        bridged = build_topology("CAC")
        sulphur = [a for a in bridged.atoms if a.name == "SG"]
        bridged.add_bond(*sulphur)
        assert build_bead_map("ca", bridged).bonds.tolist() == [[0, 1], [0, 2], [1, 2]]

    @pytest.mark.parametrize(
        ("sequence", "bonds"),
        [
            ("AGA", "CA2-CB2 CA2-CA3 CA3-CA4 CA4-CB4"),
            # Neither the ring of proline nor those of side chains join CB to anything but its CA.
            ("APWP", "CA2-CB2 CA2-CA3 CA3-CB3 CA3-CA4 CA4-CB4 CA4-CA5 CA5-CB5"),
            ("IVTF", "CA2-CB2 CA2-CA3 CA3-CB3 CA3-CA4 CA4-CB4 CA4-CA5 CA5-CB5"),
        ],
    )
    def test_beta_carbons(self, sequence: str, bonds: str) -> None:
        bead_map = build_bead_map("ca+cb", build_topology(sequence))
        sites = [f"{n}{r[1]}" for r, n in zip(bead_map.residues, bead_map.names, strict=True)]
        assert sorted(f"{sites[i]}-{sites[j]}" for i, j in bead_map.bonds) == sorted(bonds.split())
        assert bead_map.species == tuple(f"{r[0]}:{n}" for r, n in zip(bead_map.residues, bead_map.names, strict=True))
        assert "GLY:CB" not in bead_map.species
        assert [r[0] for r in bead_map.residues if r[0] in ("ACE", "NME")] == []

    def test_a_disulfide_joins_beta_carbons(self) -> None:
        bridged = build_topology("CGC")
        bridged.add_bond(*[a for a in bridged.atoms if a.name == "SG"])
        bead_map = build_bead_map("ca+cb", bridged)
        assert bead_map.names == ("CA", "CB", "CA", "CA", "CB")
        assert bead_map.bonds.tolist() == [[0, 1], [0, 2], [1, 4], [2, 3], [3, 4]]

    @pytest.mark.parametrize("name", ["C", "CH3"])
    def test_caps_continue_the_trace(self, name: str) -> None:
        """Force fields call the methyl carbon of NME C, PDB files CH3 or C."""
        topology = build_topology("APA")
        next(a for a in topology.atoms if a.residue.name == "NME" and a.name == "C").name = name
        bead_map = build_bead_map("ca+caps", topology)
        assert bead_map.species == ("ACE", "ALA", "PRO", "ALA", "NME")
        assert bead_map.names == ("CH3", "CA", "CA", "CA", name)
        assert bead_map.bonds.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
        # Without caps it is the same as ca, species and all: potentials of one serve the other.
        free = md.Topology.from_openmm(build_peptide("APA", caps=False)[0])
        assert build_bead_map("ca+caps", free).hash == build_bead_map("ca", free).hash

    @pytest.mark.parametrize(
        ("beads", "sequence", "species"),
        [
            ("ca+cb", "AGA", ("N-ALA:CA", "N-ALA:CB", "GLY:CA", "C-ALA:CA", "C-ALA:CB")),
            ("ca", "AAGAA", ("N-ALA", "ALA", "GLY", "ALA", "C-ALA")),
            ("ca", "A", ("NC-ALA",)),
            ("name CA or name CB", "AGA", ("N-ALA:CA", "N-ALA:CB", "GLY:CA", "C-ALA:CA", "C-ALA:CB")),
        ],
    )
    def test_ends_have_species_of_their_own(self, beads: str, sequence: str, species: tuple[str, ...]) -> None:
        topology = build_topology(sequence)
        found = build_bead_map(beads, topology, ends=True)
        assert found.species == species
        plain = build_bead_map(beads, topology)
        assert np.array_equal(found.site_weights, plain.site_weights)
        assert found.hash != plain.hash

    def test_backbone_atoms_are_shared_but_for_caps_and_prolines_nitrogen(self) -> None:
        topology = build_topology("AP")
        found = build_bead_map("backbone", topology, share_backbone=True)
        plain = build_bead_map("backbone", topology)
        own = ("ACE:", "NME:", "PRO:N")
        assert "PRO:N" in found.species
        assert any(s.startswith("ACE:") for s in found.species)
        for new, old in zip(found.species, plain.species, strict=True):
            shared = old.split(":")[1] in ("N", "C", "O") and not old.startswith(own)
            assert new == (f"BB:{old.split(':')[1]}" if shared else old)
        assert [s for s in found.species if s.startswith("BB:")].count("BB:C") == 2
        chain = md.Topology.from_openmm(build_peptide("GA", caps=False)[0])
        marked = build_bead_map("name N or name C", chain, ends=True, share_backbone=True)
        assert marked.species == ("N-BB:N", "N-BB:C", "C-BB:N", "C-BB:C")
        assert np.array_equal(found.site_weights, plain.site_weights)

    def test_ends_of_every_chain(self) -> None:
        chains = build_topology("AGA").join(build_topology("GA"))
        assert build_bead_map("ca", chains, ends=True).species == ("N-ALA", "GLY", "C-ALA", "N-GLY", "C-ALA")

    def test_positions_are_the_atoms(self, trajectory: md.Trajectory) -> None:
        beads = build_bead_map("ca", trajectory.topology).map_positions(trajectory.xyz)
        assert np.array_equal(beads, trajectory.xyz[:, trajectory.topology.select("name CA")].astype(float))

    @pytest.mark.parametrize("beads", ["name XX", "none", "resname GLY and name CA", "0"])
    def test_empty_selection(self, topology: md.Topology, beads: str) -> None:
        with pytest.raises(MappingError, match=r"holds no atom\. The molecule has 32 atoms"):
            build_bead_map(beads, topology)

    @pytest.mark.parametrize("beads", ["CA", "name CA or", "backbones", "5", "", "index 3 and 4", "import os", "(((("])
    def test_invalid_selection(self, topology: md.Topology, beads: str) -> None:
        with pytest.raises(MappingError, match=r"not a preset \(ca, ca\+cb, .*heavy\) or an mdtraj selection"):
            build_bead_map(beads, topology)

    def test_massless_site(self) -> None:
        topology = md.Topology()
        residue = topology.add_residue("HOH", topology.add_chain())
        topology.add_atom("O", md.element.oxygen, residue)
        topology.add_atom("M", md.element.virtual, residue)
        with pytest.raises(MappingError, match=r"bead on the massless site HOH.-M"):
            build_bead_map("all", topology)
        assert build_bead_map("name O", topology).n_beads == 1


class TestSpecies:
    def test_what_no_training_molecule_has_is_named(self) -> None:
        maps = {name: build_bead_map("ca", build_topology(name)) for name in ("AG", "GV", "AV", "AWY")}
        check_species({k: maps[k] for k in ("AG", "GV", "AV")}, ["AG", "GV"])
        with pytest.raises(MappingError, match=r"molecule AWY: .* species TRP, TYR\. .*add a training molecule"):
            check_species(maps, ["AG", "GV"])
        with pytest.raises(MappingError, match=r"molecule GV: .* species GLY, VAL"):
            check_species({k: maps[k] for k in ("GV", "AWY")}, ["AWY"])

    @pytest.mark.parametrize("species", ["*", "*:CA", "", "A|B"])
    def test_what_would_read_as_another_key(self, species: str) -> None:
        with pytest.raises(MappingError, match="unusable species"):
            build_chain_map(species=("A", species, "A"))


class TestContraction:
    @pytest.mark.parametrize(
        ("bonds", "atoms", "expected"),
        [
            ([(0, 1), (1, 2), (2, 3)], [0, 1, 2, 3], [[0, 1], [1, 2], [2, 3]]),  # nothing between
            ([(0, 1), (1, 2), (2, 3)], [0, 3], [[0, 1]]),  # a path through two atoms
            ([(0, 1), (1, 2), (2, 3)], [0, 2, 3], [[0, 1], [1, 2]]),  # a bead stops the path
            ([(0, 1), (0, 2), (0, 3)], [1, 2, 3], [[0, 1], [0, 2], [1, 2]]),  # a centre joins all its arms
            ([(0, 1), (1, 2), (2, 3), (3, 0)], [0, 2], [[0, 1]]),  # both ways round a ring, once
            ([(0, 1), (2, 3)], [0, 3], []),  # no path
            ([(3, 2), (2, 1), (1, 0)], [3, 0], [[0, 1]]),  # order of atoms and bonds does not matter
        ],
    )
    def test_known_graphs(self, bonds: list, atoms: list[int], expected: list) -> None:
        assert contract_bonds(bonds, atoms, 4).tolist() == expected

    @settings(deadline=None, derandomize=True)
    @given(data=st.data(), n=st.integers(2, 9))
    def test_a_tree_with_its_inner_atoms_gone_stays_connected(self, data: st.DataObject, n: int) -> None:
        bonds = [(data.draw(st.integers(0, i - 1)), i) for i in range(1, n)]
        atoms = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
        reached, edges = {0}, contract_bonds(bonds, atoms, n).tolist()
        for _ in atoms:
            reached |= {b for edge in edges for b in edge if set(edge) & reached}
        assert reached == set(range(len(atoms)))


class TestJson:
    def test_slice_round_trip(self, topology: md.Topology, tmp_path: Path) -> None:
        bead_map = build_bead_map("backbone", topology)
        bead_map.save(tmp_path / "map.json")
        again = BeadMap.load(tmp_path / "map.json")
        assert again.to_dict() == bead_map.to_dict()
        assert again.hash == bead_map.hash
        assert again.residues == bead_map.residues
        assert BeadMap.load(tmp_path / "map.json", topology.n_atoms).hash == bead_map.hash

    def test_centre_of_mass_round_trip(self, tmp_path: Path) -> None:
        (tmp_path / "in.json").write_text(json.dumps(CENTRES))
        bead_map = BeadMap.load(tmp_path / "in.json", 9)
        assert (bead_map.n_beads, bead_map.n_atoms) == (3, 9)
        assert bead_map.bonds.tolist() == [[0, 1]]
        bead_map.save(tmp_path / "out.json")
        again = BeadMap.load(tmp_path / "out.json")
        # JSON keeps every digit of a double.
        assert np.array_equal(again.site_weights, bead_map.site_weights)
        assert again.hash == bead_map.hash
        positions = np.random.default_rng(0).normal(size=(4, 9, 3))
        water = np.average(positions[:, [5, 4, 3]], axis=1, weights=WATER)
        # Two orders of summation of three terms of order one in double precision
        np.testing.assert_allclose(again.map_positions(positions)[:, 1], water, rtol=0, atol=1e-14)

    def test_contract_of_the_issue(self) -> None:
        text = (
            '{"beads": [{"name": "B1", "species": "X", "mass_amu": 12.0, "atoms": [0, 1], "weights": [0.5, 0.5]},'
            ' {"name": "B2", "species": "X", "mass_amu": 12.0, "atoms": [2], "weights": [1]}], "bonds": [[0, 1]]}'
        )
        assert BeadMap.from_dict(json.loads(text), 3).site_weights.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"weights": [0.5, 0.3, 0.1]}, r"weights of bead 0 \(W1\) do not sum to 1: expected 1, got 0\.9"),
            ({"weights": [0.5, 0.5]}, "each atom once: expected 3 weights, got 2"),
            ({"atoms": [0, 1, 1]}, "each atom once"),
            ({"atoms": [0, 1, 9]}, "atom that does not exist: expected 0 to 8, got 9"),
            ({"atoms": [0, 1, -1]}, "atom that does not exist: expected 0 to 8, got -1"),
            ({"atoms": [0, 1, 1.5]}, "needs lists 'atoms' and 'weights'"),
            ({"atoms": 0}, "needs lists 'atoms' and 'weights'"),
            ({"weights": ["a", "b", "c"]}, "needs lists 'atoms' and 'weights'"),
            ({"weights": [float("nan"), 0.5, 0.5]}, "weights hold NaN"),
            ({"atoms": [], "weights": []}, "do not sum to 1"),
            ({"atoms": [6], "weights": [1.0]}, "beads overlap.*expected 3 independent beads, got 2"),
            ({"mass_amu": 0.0}, r"bead 0 \(W1\) has no mass"),
            ({"mass_amu": -1.0}, "has no mass"),
            ({"mass_amu": float("nan")}, "has no mass"),
            ({"mass_amu": "heavy"}, "wrong one"),
            ({"species": "A|B"}, "unusable species name: expected text without '|'"),
            ({"species": ""}, "unusable species name"),
            *(({key: None}, "lacks|needs") for key in ("name", "species", "mass_amu", "atoms", "weights")),
        ],
    )
    def test_bad_bead(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        (tmp_path / "map.json").write_text(json.dumps(change_centres(**changes)))
        with pytest.raises(MappingError, match=rf"map\.json: .*({message})"):
            BeadMap.load(tmp_path / "map.json", 9)

    @pytest.mark.parametrize(
        ("bonds", "message"),
        [
            ([[0, 3]], "beads that do not exist"),
            ([[-1, 0]], "beads that do not exist"),
            ([[1, 1]], "joins a bead to itself"),
            ([[0, 1, 2], [0, 1, 2]], "not pairs of bead numbers"),
            ([[0, 1], [1]], "not pairs of bead numbers"),
            ([[0, 1.5]], "not pairs of bead numbers"),
            (["ab"], "not pairs of bead numbers"),
            (3, "not pairs of bead numbers"),
        ],
    )
    def test_bad_bonds(self, bonds: Any, message: str) -> None:
        with pytest.raises(MappingError, match=message):
            BeadMap.from_dict({**CENTRES, "bonds": bonds}, 9)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not JSON"),
            ("[]", "not a bead map"),
            ("{}", "not a bead map"),
            ('{"beads": {"a": 1}}', "not a bead map"),
            ('{"beads": []}', "at least one bead"),
            ('{"beads": [3]}', "needs lists"),
            ('{"beads": [], "n_atoms": -2}', "n_atoms is missing or wrong"),
            ("\udcff", "not JSON"),
        ],
    )
    def test_bad_file(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "map.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(MappingError, match=message):
            BeadMap.load(tmp_path / "map.json", 9)

    def test_no_file_no_size_other_molecule(self, tmp_path: Path) -> None:
        with pytest.raises(MappingError, match="no such map file"):
            BeadMap.load(tmp_path / "map.json")
        with pytest.raises(MappingError, match="n_atoms is missing"):
            BeadMap.from_dict(CENTRES)
        BeadMap.from_dict(CENTRES, 9).save(tmp_path / "map.json")
        with pytest.raises(MappingError, match=r"another molecule: expected 12 atoms \(molecule\), got 9 \(map\)"):
            BeadMap.load(tmp_path / "map.json", 12)


class TestBeadMap:
    def test_bonds_are_sorted_and_unique(self) -> None:
        assert build_chain_map(bonds=[[2, 1], [1, 0], [0, 1]]).bonds.tolist() == [[0, 1], [1, 2]]
        assert build_chain_map(bonds=[]).bonds.shape == (0, 2)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"species": ("A", "B")}, "species do not match the beads: expected 3, got 2"),
            ({"masses": [1.0]}, "masses do not match"),
            ({"names": ("a",)}, "names do not match"),
            ({"residues": ()}, "residues do not match"),
            ({"site_weights": np.zeros((0, 5))}, "at least one bead"),
            ({"site_weights": np.ones(5)}, "at least one bead"),
        ],
    )
    def test_sizes(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(MappingError, match=message):
            build_chain_map(**changes)

    def test_rank_counts_not_shared_atoms(self) -> None:
        shared = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
        names = {"species": ("A", "A"), "masses": [1, 1], "names": ("a", "b"), "residues": (("R", 1, 0),) * 2}
        assert build_chain_map(site_weights=shared, bonds=[], **names).n_beads == 2

    def test_hash_tells_maps_apart(self) -> None:
        weights = np.eye(3, 5)
        weights[2, 2:4] = 0.5
        maps = [
            build_chain_map(),
            build_chain_map(site_weights=weights),
            build_chain_map(species=("A", "A", "A")),
            build_chain_map(bonds=[[0, 1]]),
            build_chain_map(site_weights=np.eye(3, 6)),
        ]
        assert len({m.hash for m in maps}) == len(maps)
        assert build_chain_map().hash == build_chain_map(names=("x", "y", "z")).hash

    @pytest.mark.parametrize("shape", [(4, 3), (2, 5, 2), (5,), (2, 6, 3)])
    def test_positions_that_do_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(MappingError, match=r"do not fit the map: expected \(\.\.\., 5, 3\)"):
            build_chain_map().map_positions(np.zeros(shape))

    @settings(deadline=None, derandomize=True)
    @given(
        x=hnp.arrays(float, (2, 9, 3), elements=st.floats(-10, 10)),
        y=hnp.arrays(float, (2, 9, 3), elements=st.floats(-10, 10)),
        a=st.floats(-10, 10),
        shift=hnp.arrays(float, 3, elements=st.floats(-10, 10)),
    )
    def test_linear_and_moves_with_the_molecule(
        self, x: np.ndarray, y: np.ndarray, a: float, shift: np.ndarray
    ) -> None:
        bead_map = BeadMap.from_dict(CENTRES, 9)
        # Sums of three doubles of size 100: rounding below 1e-13; rows sum to 1 within 1e-15.
        tolerance = 1e-12
        direct = bead_map.map_positions(a * x + y)
        parts = a * bead_map.map_positions(x) + bead_map.map_positions(y)
        np.testing.assert_allclose(direct, parts, rtol=0, atol=tolerance)
        moved = bead_map.map_positions(x + shift)
        np.testing.assert_allclose(moved, bead_map.map_positions(x) + shift, rtol=0, atol=tolerance)

    def test_rotates_with_the_molecule(self) -> None:
        rng = np.random.default_rng(4)
        bead_map, x = BeadMap.from_dict(CENTRES, 9), rng.normal(size=(9, 3))
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        np.testing.assert_allclose(
            bead_map.map_positions(x @ rotation), bead_map.map_positions(x) @ rotation, rtol=0, atol=1e-14
        )  # double rounding of sums of nine terms of order one


class TestPdb:
    def test_topology(self, topology: md.Topology) -> None:
        bead_map = build_bead_map("backbone", topology)
        cg = bead_map.to_topology()
        assert [a.name for a in cg.atoms] == list(bead_map.names)
        assert [(r.name, r.resSeq) for r in cg.residues] == [("ACE", 1), ("ALA", 2), ("ALA", 3), ("NME", 4)]
        assert [[a.index, b.index] for a, b in cg.bonds] == bead_map.bonds.tolist()
        assert build_chain_map().to_topology().n_chains == 2

    def test_beads_of_a_residue_must_follow_each_other(self) -> None:
        scattered = build_chain_map(residues=(("R", 1, 0), ("R", 2, 0), ("R", 1, 0)))
        with pytest.raises(MappingError, match="must be consecutive"):
            scattered.to_topology()

    @pytest.mark.parametrize("beads", ["ca", "backbone", "heavy"])
    def test_every_bond_has_a_conect_record(self, trajectory: md.Trajectory, tmp_path: Path, beads: str) -> None:
        bead_map = build_bead_map(beads, trajectory.topology)
        positions = bead_map.map_positions(trajectory.xyz[0])
        bead_map.save_pdb(tmp_path / "cg.pdb", positions)
        lines = (tmp_path / "cg.pdb").read_text().splitlines()
        serials = [int(line[6:11]) for line in lines if line.startswith(("ATOM", "HETATM"))]
        bonds = [[int(w) for w in line.split()[1:]] for line in lines if line.startswith("CONECT")]
        assert [[serials.index(i), serials.index(j)] for i, j in bonds] == bead_map.bonds.tolist()
        assert lines[-1] == "END"
        again = md.load(str(tmp_path / "cg.pdb"), standard_names=False)
        # A PDB keeps three decimals of an Angstrom.
        np.testing.assert_allclose(again.xyz[0], positions, rtol=0, atol=5.1e-5)
        assert {tuple(sorted((a.index, b.index))) for a, b in again.topology.bonds} == set(
            map(tuple, bead_map.bonds.tolist())
        )

    def test_two_chains(self, tmp_path: Path) -> None:
        build_chain_map().save_pdb(tmp_path / "cg.pdb", np.arange(9.0).reshape(3, 3))
        again = md.load(str(tmp_path / "cg.pdb"), standard_names=False)
        assert again.topology.n_chains == 2
        assert [(a.index, b.index) for a, b in again.topology.bonds] == [(0, 1), (1, 2)]

"""Prior terms of a molecule: which there are, and which parameters they get."""

from __future__ import annotations

import logging
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_hvpcg.errors import PotentialError
from openmm_hvpcg.prior_terms import (
    ANY,
    DIHEDRAL_ORDER,
    PriorParameters,
    assign_prior_terms,
    bond_key,
    build_prior_geometry,
    chain_key,
    improper_key,
    list_keys,
)

TERMS = ("bonds", "angles", "dihedrals", "impropers", "pairs")
DIHEDRAL = tuple(0.1 * n for n in range(2 * DIHEDRAL_ORDER))


def enumerate_terms(bonds: list[tuple[int, int]], n_beads: int) -> dict[str, set[tuple[int, ...]]]:
    """Terms with one reading direction: ends of angles and dihedrals in order."""
    geometry = build_prior_geometry(np.array(bonds, dtype=np.int64).reshape(-1, 2), n_beads)
    found = {}
    for name in TERMS:
        rows = [tuple(row) for row in getattr(geometry, name).tolist()]
        if name in ("angles", "dihedrals"):
            rows = [min(row, row[::-1]) for row in rows]
        assert len(set(rows)) == len(rows), f"{name} twice"
        found[name] = set(rows)
    return found


class TestGeometry:
    def test_chain(self) -> None:
        assert enumerate_terms([(0, 1), (1, 2), (2, 3), (3, 4)], 5) == {
            "bonds": {(0, 1), (1, 2), (2, 3), (3, 4)},
            "angles": {(0, 1, 2), (1, 2, 3), (2, 3, 4)},
            "dihedrals": {(0, 1, 2, 3), (1, 2, 3, 4)},
            "impropers": set(),
            "pairs": {(0, 4)},
        }

    def test_branch(self) -> None:
        # 0 - 1(-3) - 2 - 4
        assert enumerate_terms([(0, 1), (1, 2), (1, 3), (2, 4)], 5) == {
            "bonds": {(0, 1), (1, 2), (1, 3), (2, 4)},
            "angles": {(0, 1, 2), (0, 1, 3), (2, 1, 3), (1, 2, 4)},
            "dihedrals": {(0, 1, 2, 4), (3, 1, 2, 4)},
            "impropers": {(1, 0, 2, 3)},
            "pairs": set(),
        }

    def test_centre_of_four(self) -> None:
        terms = enumerate_terms([(0, 1), (0, 2), (0, 3), (0, 4)], 5)
        assert len(terms["angles"]) == 6
        assert terms["impropers"] == {(0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4), (0, 2, 3, 4)}
        assert terms["dihedrals"] == terms["pairs"] == set()

    def test_ring_of_three_has_no_dihedral(self) -> None:
        assert enumerate_terms([(0, 1), (1, 2), (0, 2)], 3) == {
            "bonds": {(0, 1), (1, 2), (0, 2)},
            "angles": {(0, 1, 2), (1, 0, 2), (0, 2, 1)},
            "dihedrals": set(),
            "impropers": set(),
            "pairs": set(),
        }

    def test_rings(self) -> None:
        for n in (4, 5, 6, 8):
            terms = enumerate_terms([(i, (i + 1) % n) for i in range(n)], n)
            assert len(terms["angles"]) == len(terms["dihedrals"]) == n
            # Up to a ring of seven all pairs are within three bonds.
            assert terms["pairs"] == ({(i, i + 4) for i in range(4)} if n == 8 else set())

    def test_apart(self) -> None:
        assert enumerate_terms([(0, 1)], 4)["pairs"] == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
        assert enumerate_terms([], 1) == {name: set() for name in TERMS}

    def test_shapes_of_nothing(self) -> None:
        geometry = build_prior_geometry(np.empty((0, 2), dtype=np.int64), 2)
        shapes = [getattr(geometry, name).shape for name in TERMS]
        assert shapes == [(0, 2), (0, 3), (0, 4), (0, 4), (1, 2)]

    @settings(deadline=None, derandomize=True)
    @given(data=st.data(), n=st.integers(1, 8))
    def test_agrees_with_the_definitions_on_any_graph(self, data: st.DataObject, n: int) -> None:
        every = [(i, j) for i in range(n) for j in range(i + 1, n)]
        bonds = sorted(data.draw(st.sets(st.sampled_from(every)))) if every else []
        joined = np.zeros((n, n), dtype=bool)
        for i, j in bonds:
            joined[i, j] = joined[j, i] = True

        def walks(length: int) -> set[tuple[int, ...]]:
            return {
                min(w, w[::-1]) for w in permutations(range(n), length) if all(joined[a, b] for a, b in pairwise(w))
            }

        terms = enumerate_terms(bonds, n)
        assert terms["bonds"] == walks(2)
        assert terms["angles"] == walks(3)
        assert terms["dihedrals"] == walks(4)
        near = {tuple(sorted((w[0], w[-1]))) for length in (2, 3, 4) for w in walks(length)}
        assert terms["pairs"] == set(every) - near


class TestKeys:
    @given(st.lists(st.sampled_from("ABC"), min_size=2, max_size=2))
    def test_bond_reads_either_way(self, species: list[str]) -> None:
        assert bond_key(species) == bond_key(species[::-1])

    @given(st.lists(st.sampled_from("ABC"), min_size=3, max_size=4))
    def test_chain_reads_either_way_and_no_other(self, species: list[str]) -> None:
        assert chain_key(species) == chain_key(species[::-1])
        for other in permutations(species):
            same = list(other) in (species, species[::-1])
            assert (chain_key(other) == chain_key(species)) == same

    def test_forms(self) -> None:
        assert bond_key(("B", "A")) == "A|B"
        assert chain_key(("C", "A", "B")) == "B|A|C"
        assert chain_key(("A", "D", "B", "A")) == "A|B|D|A"
        assert improper_key(("C", "B", "A", "D")) == "C|B|A|D"

    @pytest.mark.parametrize(
        ("term", "species", "keys"),
        [
            ("bonds", "B A", ["A|B", "*"]),
            ("angles", "C A B", ["B|A|C", "*|A|*", "*"]),
            ("dihedrals", "D C B A", ["A|B|C|D", "*|B|C|*", "*"]),
            ("impropers", "C B A D", ["C|B|A|D", "C|*|*|*", "*"]),
            ("repulsion", "B A", ["A|B", "*"]),
            # Species that name an atom: a bond of CA to CB is never given the parameters of one of CA to CA.
            ("bonds", "V:CB V:CA", ["V:CA|V:CB", "*:CA|*:CB", "*"]),
            ("angles", "V:CB V:CA G:CA", ["G:CA|V:CA|V:CB", "*:CA|V:CA|*:CB", "*:CA|*:CA|*:CB", "*"]),
            (
                "dihedrals",
                "V:CB V:CA G:CA S:CA",
                ["S:CA|G:CA|V:CA|V:CB", "*:CA|G:CA|V:CA|*:CB", "*:CA|*:CA|*:CA|*:CB", "*"],
            ),
            ("impropers", "V:CA G:CA V:CB", ["V:CA|G:CA|V:CB", "V:CA|*:CA|*:CB", "*:CA|*:CA|*:CB", "*"]),
            ("repulsion", "V:CB X", ["V:CB|X", "*|*:CB", "*"]),
            # Caps are a kind of their own, but for repulsion.
            ("bonds", "ACE V", ["ACE|V", "*|ACE", "*"]),
            ("angles", "ACE V G", ["ACE|V|G", "*|V|ACE", "*|*|ACE", "*"]),
            ("repulsion", "ACE NME", ["ACE|NME", "*"]),
        ],
    )
    def test_from_specific_to_general(self, term: str, species: str, keys: list[str]) -> None:
        names = species.split()
        assert list_keys(term, names) == keys
        if term != "impropers":
            assert list_keys(term, names[::-1]) == keys


PARAMETERS = PriorParameters(
    bonds={"A|B": (10.0, 0.3), "B|B": (20.0, 0.4)},
    angles={"A|B|B": (1.0, -0.5), ANY: (2.0, -0.2)},
    dihedrals={"A|B|B|A": DIHEDRAL},
    repulsion={ANY: (0.5,)},
    repulsion_epsilon=2.5,
)
CHAIN = np.array([[0, 1], [1, 2], [2, 3]])


class TestAssignment:
    def test_row_by_row(self) -> None:
        terms = assign_prior_terms(PARAMETERS, tuple("ABBA"), CHAIN)
        assert terms.geometry.bonds.tolist() == CHAIN.tolist()
        assert terms.bonds.tolist() == [[10.0, 0.3], [20.0, 0.4], [10.0, 0.3]]
        assert terms.geometry.angles.tolist() == [[0, 1, 2], [1, 2, 3]]
        assert terms.angles.tolist() == [[1.0, -0.5, 0.0, 0.0]] * 2
        assert terms.dihedrals.tolist() == [list(DIHEDRAL)]
        assert terms.repulsion_epsilon == 2.5

    def test_a_term_switched_off_has_no_rows(self) -> None:
        terms = assign_prior_terms(PriorParameters(bonds=PARAMETERS.bonds), tuple("ABBA"), CHAIN)
        assert len(terms.bonds) == 3
        for name, width in (("angles", 3), ("dihedrals", 4), ("impropers", 4), ("pairs", 2)):
            assert getattr(terms.geometry, name).shape == (0, width)
        shapes = [getattr(terms, name).shape for name in TERMS]
        assert shapes == [(3, 2), (0, 4), (0, 2 * DIHEDRAL_ORDER), (0, 2), (0, 1)]

    def test_one_bead(self) -> None:
        terms = assign_prior_terms(PARAMETERS, tuple("A"), np.empty((0, 2), dtype=np.int64))
        assert [len(getattr(terms, name)) for name in TERMS] == [0] * 5

    def test_the_most_specific_parameters_there_are(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, "openmm_hvpcg"):
            assign_prior_terms(PARAMETERS, tuple("ABB"), CHAIN[:2])
        assert not caplog.records
        parameters = PriorParameters(
            bonds={**PARAMETERS.bonds, ANY: (7.0, 0.7)},
            angles={**PARAMETERS.angles, "*|C|*": (3.0, -0.3)},
            dihedrals={**PARAMETERS.dihedrals, "*|B|C|*": DIHEDRAL[::-1]},
        )
        with caplog.at_level(logging.DEBUG, "openmm_hvpcg"):
            terms = assign_prior_terms(parameters, tuple("ABCB"), CHAIN)
        assert terms.bonds.tolist() == [[10.0, 0.3], [7.0, 0.7], [7.0, 0.7]]
        assert terms.angles.tolist() == [[2.0, -0.2, 0.0, 0.0], [3.0, -0.3, 0.0, 0.0]]
        assert terms.dihedrals.tolist() == [list(DIHEDRAL[::-1])]
        (record,) = caplog.records
        assert record.levelno == logging.DEBUG
        assert record.getMessage().endswith("2 of 3 bonds, 2 of 2 angles, 1 of 1 dihedrals")

    @pytest.mark.parametrize(
        ("species", "message"),
        [("ABC", r"no bond parameters for B\|C"), ("ABBB", r"no dihedral parameters for A\|B\|B\|B")],
    )
    def test_without_general_parameters_it_refuses(self, species: str, message: str) -> None:
        with pytest.raises(PotentialError, match=message + ".*Train on a molecule"):
            assign_prior_terms(PARAMETERS, tuple(species), CHAIN[: len(species) - 1])


class TestParameters:
    def test_round_trip(self) -> None:
        assert PriorParameters.from_dict(PARAMETERS.to_dict()) == PARAMETERS
        assert PriorParameters.from_dict(PriorParameters().to_dict()) == PriorParameters()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bonds": None}, "malformed"),
            ({"bonds": {"A|B": 3}}, "malformed"),
            ({"bonds": {"A|B": ["x", 1]}}, "malformed"),
            ({"bonds": {"A|B": [1.0]}}, r"bonds parameters of A\|B are malformed: expected 2 numbers"),
            ({"bonds": {"A|B": [1.0, float("nan")]}}, "bonds parameters of"),
            ({"dihedrals": {"*": [1.0, 2.0]}}, "dihedrals parameters of .* expected 6 numbers"),
            ({"repulsion": {"*": [0.5, 1.0]}}, "expected 1 numbers"),
            ({"repulsion_epsilon": None}, "malformed"),
        ],
    )
    def test_malformed(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(PotentialError, match=message):
            PriorParameters.from_dict({**PARAMETERS.to_dict(), **change})

    @pytest.mark.parametrize("key", PARAMETERS.to_dict())
    def test_missing(self, key: str) -> None:
        content = PARAMETERS.to_dict()
        del content[key]
        with pytest.raises(PotentialError, match=f"malformed .'{key}'"):
            PriorParameters.from_dict(content)

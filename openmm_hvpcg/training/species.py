"""What sets the species of residues apart in a network, shrunk to what so few molecules can tell.

A residue that occurs in five training molecules was seen among ten neighbours: much of what a network learns about it
is about them. That does no harm on these molecules, not on their held-out frames either, and shows on others. So, once
a network is trained, the embedding of each species is moved towards the mean over all species of its kind (the same
atom of other residues; caps are a kind of their own), and keeps the share

    n / (n + n0)

of its distance, of a species in n training molecules: the posterior mean where species differ by a normal law and each
molecule adds noise to what it tells of the difference, with a variance ``n0`` times that of the species (empirical
Bayes: Efron and Morris, J. Am. Stat. Assoc. 70, 311 (1975)). ``training.species_molecules`` is n0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from openmm_hvpcg.prior_terms import find_kind
from openmm_hvpcg.training.dataset import LabelledFrames


def compute_shares(datasets: Sequence[LabelledFrames], half_at: float) -> dict[str, float]:
    """Share kept by each species of which there are others of its kind, by the number of molecules that have it."""
    counts: dict[str, int] = {}
    for dataset in datasets:
        for species in sorted(set(dataset.bead_map.species)):
            counts[species] = counts.get(species, 0) + 1
    kinds = [find_kind(s) for s in counts]
    return {s: n / (n + half_at) for (s, n), kind in zip(counts.items(), kinds, strict=True) if kinds.count(kind) > 1}


def shrink_species(network: nn.Module, species: Sequence[str], shares: Mapping[str, float]) -> None:
    """Move the embeddings of a network towards their means, in place.

    Parameters
    ----------
    network : one of the package's own
    species : of the potential, in order
    shares : of :func:`compute_shares`; other species stay as they are
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(species):
        if name in shares:
            groups.setdefault(find_kind(name), []).append(index)
    embeddings = [m.weight for m in network.modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for weight in embeddings:
            for rows in groups.values():
                mean = weight[rows].mean(dim=0)
                kept = torch.tensor([shares[species[k]] for k in rows]).to(weight)[:, None]
                weight[rows] = mean + kept * (weight[rows] - mean)

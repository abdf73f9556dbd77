from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.errors import DataError
from openmm_hvpcg.prior_terms import list_rows
from openmm_hvpcg.training.batches import (
    BatchIndex,
    BatchSampler,
    FrameBatches,
    FrameGroup,
    MoleculeSize,
    group_molecules,
)
from openmm_hvpcg.training.dataset import choose_evenly, split_by_time_blocks
from openmm_hvpcg.training.models.torsions import Bonded


def test_split_holds_out_blocks_of_every_walker():
    walker = np.repeat([0, 1], [100, 60])
    training, validation = split_by_time_blocks(walker, 0.2, 5)
    assert sorted([*training, *validation]) == list(range(160))
    assert len(validation) == 32
    for w, size in ((0, 100), (1, 60)):
        held = validation[walker[validation] == w]
        assert len(held) == size * 0.2
        # Contiguous blocks: five runs, hence four gaps, in each walker.
        assert (np.diff(held) > 1).sum() == 4


def test_split_of_very_few_frames():
    training, validation = split_by_time_blocks(np.zeros(5, dtype=int), 0.2, 5)
    assert (len(training), len(validation)) == (4, 1)
    with pytest.raises(DataError, match="too few frames to split"):
        split_by_time_blocks(np.zeros(2, dtype=int), 0.2, 5)


def test_labels_check_shapes_and_finiteness():
    data = build_labels(30)
    with pytest.raises(DataError, match="'forces' has the wrong shape"):
        replace(data, forces=data.forces[:-1])
    with pytest.raises(DataError, match="'hvps' has the wrong shape"):
        replace(data, hvps=data.hvps[:, :1])
    broken = data.hvps.copy()
    broken[7, 1, 2, 0] = np.nan
    with pytest.raises(DataError, match="hvps hold NaN or infinity, first in frame 7"):
        replace(data, hvps=broken)


def test_hash_tells_labels_apart():
    data = build_labels(30)
    assert data.hash == build_labels(30).hash
    assert data.hash != replace(data, forces=data.forces * 1.0001).hash


def test_averaged_labels_carry_their_covariances():
    data = build_labels(30, force_noise=10.0, n_samples=5)
    bare = replace(data, covariances=None)
    assert data.hash != bare.hash
    assert data.hash != replace(data, covariances=data.covariances * np.float32(1.0001)).hash
    rows = np.array([7, 3])
    np.testing.assert_array_equal(data.select(rows).covariances, data.covariances[rows])
    np.testing.assert_array_equal(data.select(rows).hvps, data.hvps[rows])
    assert bare.select(rows).covariances is None
    with pytest.raises(DataError, match="'covariances' has the wrong shape"):
        replace(data, covariances=data.covariances[:, :2])
    broken = data.covariances.copy()
    broken[4, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="covariances hold NaN or infinity, first in frame 4"):
        replace(data, covariances=broken)


@pytest.mark.parametrize(
    ("sizes", "n", "shares"), [((100, 60), 16, (10, 6)), ((5, 5, 90), 12, (2, 1, 9)), ((3, 4), 7, (3, 4))]
)
def test_frames_are_chosen_evenly(sizes, n, shares):
    walker = np.repeat(np.arange(len(sizes)), sizes)
    chosen = choose_evenly(walker, n)
    assert len(np.unique(chosen)) == n
    for w, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        own = chosen[walker[chosen] == w]
        assert len(own) == share
        # Spacings differ by no more than rounding, and so do the two ends.
        gaps = np.diff(own)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
        start = np.flatnonzero(walker == w)[0]
        assert abs((own[0] - start) - (start + size - 1 - own[-1])) <= size / share


def test_thinned_labels_are_of_the_chosen_frames():
    data = build_labels(40)
    few = data.thin(10)
    np.testing.assert_array_equal(few.hvps, data.hvps[choose_evenly(data.walker, 10)])
    assert few.n_frames == 10
    assert data.thin(None) is data.thin(50) is data
    with pytest.raises(DataError, match="mol: fewer frames wanted than there are walkers: expected at least 2, got 1"):
        data.thin(1)


@pytest.fixture
def sampler():
    """Three molecules, the first and the last of as many beads."""
    frames = [np.arange(10), np.arange(5, 12), np.arange(20, 25)]
    return BatchSampler(frames, [3, 2, 1], 4, shuffle=True, seed=1, groups=[(0, 2), (1,)])


def list_batches(sampler):
    return [tuple(np.asarray(a).tolist() for a in index) for index in sampler]


def test_batches_cover_every_frame_once_an_epoch(sampler):
    seen, mixed = {0: [], 1: [], 2: []}, 0
    for index in sampler:
        assert len(index.frames) <= 4
        assert index.probes.shape == (len(index.frames), 1)
        assert index.weight == 1.0
        assert set(index.molecules) <= {0, 2} or set(index.molecules) == {1}
        mixed += len(set(index.molecules)) > 1
        for molecule, frame, (probe,) in zip(*index[:3], strict=True):
            assert probe < [3, 2, 1][molecule]
            seen[molecule].append(frame)
    assert {k: sorted(f) for k, f in seen.items()} == {
        0: list(range(10)),
        1: list(range(5, 12)),
        2: list(range(20, 25)),
    }
    assert mixed >= 2
    # 15 frames of a group and 7 of the other, four a batch.
    assert len(sampler) == len(list(sampler)) == 6


def test_order_is_fixed_by_seed_and_epoch(sampler):
    first = list_batches(sampler)
    assert list_batches(sampler) == first
    sampler.set_epoch(1)
    assert list_batches(sampler) != first
    sampler.set_epoch(0)
    assert list_batches(sampler) == first


def test_batches_of_one_molecule_are_those_of_earlier_versions():
    """Trainings begun then go on with the batches they would have had."""
    frames = np.arange(5, 40, 2)
    generator = np.random.default_rng([7, 3])
    order, probes = generator.permutation(frames), generator.integers(0, 3, (18, 1))
    expected = [(order[k : k + 4].tolist(), probes[k : k + 4].tolist()) for k in range(0, 18, 4)]
    generator.shuffle(expected)
    sampler = BatchSampler([frames], [3], 4, shuffle=True, seed=7)
    sampler.set_epoch(3)
    assert [b[1:3] for b in list_batches(sampler)] == expected


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_every_batch(n_ranks, shuffle):
    """Together they have the frames of the batch of one process; weighted means of the parts are the batch's mean."""

    def build(rank=0, n_ranks=1):
        groups = dict(groups=[(0, 1)], rank=rank, n_ranks=n_ranks)
        return list(BatchSampler([np.arange(10), np.arange(7)], [3, 2], 4, shuffle=shuffle, seed=1, **groups))

    parts = zip(*(build(rank, n_ranks) for rank in range(n_ranks)), strict=True)
    sizes = []
    for whole, part in zip(build(), parts, strict=True):
        counted = [p for p in part if p.weight > 0]
        rows = {(m, f, p[0]) for q in counted for m, f, p in zip(*(a.tolist() for a in q[:3]), strict=True)}
        assert rows == {(m, f, p[0]) for m, f, p in zip(*(a.tolist() for a in whole[:3]), strict=True)}
        assert all(len(p.frames) >= 1 for p in part)
        mean = sum(p.weight * p.frames.mean() for p in part) / n_ranks
        assert mean == pytest.approx(whole.frames.mean(), rel=1e-12)
        sizes.append(len(whole.frames))
    # The last one has fewer frames than there are processes.
    assert min(sizes) == 1


def build_chain(n_beads):
    bonds = np.array([(k, k + 1) for k in range(n_beads - 1)])
    return Bonded(*(torch.from_numpy(list_rows(bonds, n_beads, k)) for k in (4, 5)))


LINEAR = {n: build_chain(n) for n in (4, 5, 6)}


def build_group(n_frames=(30, 20), n_probes=(3, 2), optional=True):
    """Random tensors of molecules of five beads."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        MoleculeSize(t, p, torch.randint(3, (5,), generator=generator), LINEAR[5])
        for t, p in zip(n_frames, n_probes, strict=True)
    ]
    group = FrameGroup.allocate(range(len(sizes)), sizes, whitened=optional, dense=optional)
    tensors = (group.positions, group.forces, group.probes, group.hvps, group.covariances)
    for tensor in (*tensors, group.whitening, group.density_forces, group.density_probes):
        if tensor is not None:
            tensor.normal_(generator=generator)
    group.own_share.copy_(torch.rand(len(sizes), generator=generator))
    return group


def test_batch_holds_the_frames_and_probes_it_was_asked_for():
    group = build_group()
    molecules, frames, probes = np.array([0, 1, 0]), np.array([4, 2, 2]), np.array([[1], [0], [2]])
    batch = FrameBatches([group])[BatchIndex(molecules, frames, probes)]
    own = [group.get_molecule(k) for k in range(2)]
    assert [len(m.positions) for m in own] == [30, 20]
    for name in ("probes", "hvps", "covariances", "density_probes"):
        rows = [getattr(own[m], name)[f, p] for m, f, (p,) in zip(molecules, frames, probes, strict=True)]
        assert torch.equal(getattr(batch, name)[:, 0], torch.stack(rows))
    for name in ("positions", "forces", "whitening", "density_forces"):
        rows = [getattr(own[m], name)[f] for m, f in zip(molecules, frames, strict=True)]
        assert torch.equal(getattr(batch, name), torch.stack(rows))
    assert batch.own_share.tolist() == [own[m].own_share for m in molecules]
    assert torch.equal(batch.species, torch.stack([own[m].species for m in molecules]))


def test_batch_of_one_molecule_has_one_row_of_species():
    """Networks that cannot take more are trained on these."""
    group = build_group((10,), (2,), optional=False)
    batch = FrameBatches([group])[BatchIndex(np.array([0, 0]), np.array([3, 1]), np.array([[1], [0]]))]
    assert torch.equal(batch.species, group.species[0])
    assert batch.whitening is batch.density_forces is batch.density_probes is None


def test_molecules_of_as_many_beads_bonded_alike_share_batches():
    sizes = [MoleculeSize(1, 1, torch.zeros(n, dtype=torch.long), LINEAR[n]) for n in (5, 4, 5, 6, 4)]
    assert group_molecules(sizes) == [[0, 2], [1, 4], [3]]
    branched = np.array([(0, 1), (1, 2), (1, 3), (3, 4)])
    sizes[2] = sizes[2]._replace(bonded=Bonded(*(torch.from_numpy(list_rows(branched, 5, k)) for k in (4, 5))))
    assert group_molecules(sizes) == [[0], [1, 4], [2], [3]]
    assert group_molecules(sizes, mixed=False) == [[0], [1], [2], [3], [4]]


def test_what_is_written_to_a_molecule_is_in_its_group():
    group = build_group()
    second = group.get_molecule(1)
    second.hvps[7, 1] = 3.5
    second.positions[0] = -1.0
    assert bool((group.hvps[30 * 3 + 7 * 2 + 1] == 3.5).all())
    assert bool((group.positions[30] == -1.0).all())

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.errors import DataError
from openmm_hvpcg.training.batches import BatchSampler, FrameBatches, MoleculeTensors
from openmm_hvpcg.training.dataset import split_by_time_blocks


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


@pytest.fixture
def sampler():
    return BatchSampler([np.arange(10), np.arange(5, 12)], [3, 2], 4, shuffle=True, seed=1)


def test_batches_cover_every_frame_once_an_epoch(sampler):
    seen = {0: [], 1: []}
    for molecule, frames, probes in sampler:
        assert len(frames) <= 4
        assert probes.shape == (len(frames), 1)
        assert probes.max() < [3, 2][molecule]
        seen[molecule] += frames.tolist()
    assert sorted(seen[0]) == list(range(10))
    assert sorted(seen[1]) == list(range(5, 12))


def test_order_is_fixed_by_seed_and_epoch(sampler):
    def order():
        return [(m, f.tolist(), p.tolist()) for m, f, p in sampler]

    first = order()
    assert order() == first
    sampler.set_epoch(1)
    assert order() != first
    sampler.set_epoch(0)
    assert order() == first


def test_batch_holds_the_probes_it_was_asked_for():
    data = build_labels(30, force_noise=10.0, n_samples=5)
    positions, forces, probes, hvps, covariances = (
        torch.from_numpy(getattr(data, n)) for n in ("positions", "forces", "probes", "hvps", "covariances")
    )
    whitening = torch.randn(30, 15, 15, generator=torch.Generator().manual_seed(0))
    tensors = MoleculeTensors(positions, forces, probes, hvps, torch.arange(5), covariances, 0.25, whitening)
    index = (0, np.array([4, 2]), np.array([[1], [2]]))
    batch = FrameBatches([tensors])[index]
    for name in ("probes", "hvps", "covariances"):
        source = getattr(tensors, name)
        assert torch.equal(getattr(batch, name)[:, 0], torch.stack([source[4, 1], source[2, 2]]))
    for name in ("positions", "forces", "whitening"):
        assert torch.equal(getattr(batch, name), getattr(tensors, name)[[4, 2]])
    assert batch.own_share == 0.25
    assert torch.equal(batch.species, torch.arange(5))
    assert FrameBatches([replace(tensors, whitening=None)])[index].whitening is None

from __future__ import annotations

import numpy as np
import pytest

from openmm_hvpcg.errors import DataError
from openmm_hvpcg.training.labels.signs import MAX_FRAME, draw_signs

FRAMES = np.array([0, 1, 2, 77, 65536, 2**31, MAX_FRAME])


@pytest.mark.parametrize("n_signs", [1, 2, 17, 72])
@pytest.mark.parametrize(
    "seed", [0, 7, 2**31 - 1, 2**32, 2**70 + 3, 2**130 + 17], ids=["0", "7", "31 bits", "33", "71", "131"]
)
def test_signs_are_those_of_a_generator_for_each_frame(seed, n_signs):
    """A seed of up to four words and more: the frame's index then falls outside the pool, which mixes it otherwise."""
    expected = [2.0 * np.random.default_rng([seed, int(f)]).integers(0, 2, n_signs) - 1.0 for f in FRAMES]
    np.testing.assert_array_equal(draw_signs(seed, FRAMES, n_signs), np.stack(expected))


def test_thousands_of_frames_at_once_are_the_same_as_alone():
    frames = np.random.default_rng(3).integers(0, MAX_FRAME, 4000)
    signs = draw_signs(5, frames, 30)
    assert signs.dtype == np.float32
    alone = [2.0 * np.random.default_rng([5, int(f)]).integers(0, 2, 30) - 1.0 for f in frames]
    np.testing.assert_array_equal(signs, np.stack(alone))


def test_no_frames_no_signs():
    assert draw_signs(1, np.empty(0, np.int64), 6).shape == (0, 6)


@pytest.mark.parametrize("frame", [-1, MAX_FRAME + 1])
def test_frames_that_would_wrap_around_are_refused(frame):
    with pytest.raises(DataError, match=f"index from 0 to {MAX_FRAME}, got {frame}"):
        draw_signs(1, np.array([3, frame]), 6)

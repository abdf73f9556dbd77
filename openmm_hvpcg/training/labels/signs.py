"""The random signs of many frames at once, each frame's from a generator of its own.

The stream of a frame is that of ``numpy.random.default_rng([seed, frame])``, bit for bit; a generator object for each
frame would take longer than the force calls of a small molecule. So its parts are written out for arrays of frames:
the mixing of the seed, the generator, and the draw, a top bit.

References
----------
O'Neill, HMC-CS-2014-0905 (2014), PCG XSL RR 128/64; ``numpy.random.SeedSequence`` (NEP 19).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import DataError

Words = NDArray[np.uint32]
Longs = NDArray[np.uint64]

#: The largest index of a frame that is one word of the seed.
MAX_FRAME = _MASK = 2**32 - 1
_POOL = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_HALF = np.uint32(16)
#: Multiplier of the generator, its 64-bit halves.
_HIGH, _LOW = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)
_32, _63 = np.uint64(32), np.uint64(63)
_LOWER = np.uint64(_MASK)


def draw_signs(seed: int, frames: NDArray[np.int64], n_signs: int) -> NDArray[np.float32]:
    """Signs (n, n_signs): ``2 default_rng([seed, frame]).integers(0, 2, n_signs) - 1`` of each frame.

    Parameters
    ----------
    seed : not negative
    frames : (n,) indices

    Raises
    ------
    DataError
        An index is not from 0 to :data:`MAX_FRAME`.
    """
    outside = frames[(frames < 0) | (frames > MAX_FRAME)]
    if len(outside) > 0:
        raise DataError("no such frame", expected=f"an index from 0 to {MAX_FRAME}", got=int(outside[0]))
    signs = np.empty((len(frames), n_signs), dtype=np.float32)
    # Modular arithmetic: what runs over is meant to.
    with np.errstate(over="ignore"):
        state, increment = _seed_generators(_mix_entropy(seed, frames.astype(np.uint32)))
        for k in range(0, n_signs, 2):
            state = _step(state, increment)
            drawn = _scramble(*state)
            signs[:, k] = (drawn >> np.uint64(31)) & np.uint64(1)
            if k + 1 < n_signs:
                signs[:, k + 1] = drawn >> _63
    signs *= 2.0
    signs -= 1.0
    return signs


def _mix_entropy(seed: int, frames: Words) -> list[Words]:
    """The pool of ``SeedSequence([seed, frame])``, four words, each of all frames."""
    words = [seed & _MASK]
    while seed := seed >> 32:
        words.append(seed & _MASK)
    entropy: Sequence[Words] = [*(np.full(len(frames), w, np.uint32) for w in words), frames]
    factor = _INIT_A

    def hash_word(word: Words) -> Words:
        nonlocal factor
        word = word ^ np.uint32(factor)
        factor = factor * _MULT_A & _MASK
        word = word * np.uint32(factor)
        return word ^ (word >> _HALF)

    def mix(left: Words, right: Words) -> Words:
        word = left * _MIX_LEFT - right * _MIX_RIGHT
        return word ^ (word >> _HALF)

    empty = np.zeros_like(frames)
    pool = [hash_word(entropy[k] if k < len(entropy) else empty) for k in range(_POOL)]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mix(pool[target], hash_word(pool[source]))
    for word in entropy[_POOL:]:
        for target in range(_POOL):
            pool[target] = mix(pool[target], hash_word(word))
    return pool


def _seed_generators(pool: list[Words]) -> tuple[tuple[Longs, Longs], tuple[Longs, Longs]]:
    """State and increment, their high and low halves, of a generator for each frame."""
    factor, words = _INIT_B, []
    for k in range(2 * _POOL):
        word = pool[k % _POOL] ^ np.uint32(factor)
        factor = factor * _MULT_B & _MASK
        word = word * np.uint32(factor)
        words.append((word ^ (word >> _HALF)).astype(np.uint64))
    high, low, inc_high, inc_low = (words[2 * k] | words[2 * k + 1] << _32 for k in range(_POOL))
    increment = inc_high << np.uint64(1) | inc_low >> _63, inc_low << np.uint64(1) | np.uint64(1)
    # The first step, from zero, leaves the increment.
    return _step(_add(increment, (high, low)), increment), increment


def _add(a: tuple[Longs, Longs], b: tuple[Longs, Longs]) -> tuple[Longs, Longs]:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _step(state: tuple[Longs, Longs], increment: tuple[Longs, Longs]) -> tuple[Longs, Longs]:
    """``state * multiplier + increment`` modulo 2^128."""
    high, low = state
    a, b = low >> _32, low & _LOWER
    c, d = _LOW >> _32, _LOW & _LOWER
    # Schoolbook: the high half of low * _LOW from 32-bit digits.
    inner = a * d + (b * d >> _32)
    middle = b * c + (inner & _LOWER)
    carried = a * c + (inner >> _32) + (middle >> _32)
    return _add((carried + high * _LOW + low * _HIGH, low * _LOW), increment)


def _scramble(high: Longs, low: Longs) -> Longs:
    """The halves' exclusive or, turned by the top six bits."""
    word: Longs = high ^ low
    turn: Longs = high >> np.uint64(58)
    return word >> turn | word << (-turn & _63)

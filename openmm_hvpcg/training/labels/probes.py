"""Random probes for Hessian-vector products: their laws, seeds and second moments.

With ``E[v v^T] = S``, ``E_v |A v|^2 = |A S^(1/2)|_F^2``: S = 1 makes the HVP loss an unbiased estimate of the
Frobenius-norm objective, any other S a weighted norm, and so does the dataset name it (theory note).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.training.labels.signs import draw_signs

#: Share of a spring's stiffness that also acts across its line: keeps straight and flat molecules from having modes of
#: no stiffness at all (central springs do not resist bending out of a line or a plane).
ISOTROPIC_SHARE = 0.1
#: Springs weaken as this power of the distance: no cutoff to choose, and bonds are the stiffest. Of 2, 4 and 6, this
#: one orders and spaces the modes most like the projected Hessians of small peptides do.
SPRING_POWER = 6
#: Beads closer than this, nm, count as this far apart: those in one place would have an infinite spring.
SHORTEST_NM = 0.01
#: Rotations whose displacement is below this share of the size of the molecule are none: the beads lie on a line.
LINE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ProbeLaw:
    """A law of probes, by name.

    Attributes
    ----------
    name : "rademacher" (signs), "normal", or "soft": normal with covariance S built from the soft modes of an elastic
        network on the frame's beads, see :func:`compute_soft_modes`
    n_modes : soft: the softest so many modes; None for all that are not rigid motions
    translations : "keep", or "remove": take the uniform displacement, a null vector of every CG Hessian without an
        external field, out of each probe. ``soft`` never has it.
    """

    name: str = "rademacher"
    n_modes: int | None = None
    translations: str = "keep"

    def __post_init__(self) -> None:
        if self.name not in ("rademacher", "normal", "soft"):
            raise ConfigError("no such probe law", expected="rademacher, normal, soft", got=self.name)
        if self.translations not in ("keep", "remove"):
            raise ConfigError("translations of probes", expected="keep or remove", got=self.translations)
        if self.n_modes is not None and (self.name != "soft" or self.n_modes < 1):
            raise ConfigError("a number of modes", expected="at least 1, with the soft law", got=self.n_modes)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> ProbeLaw:
        """The law of a dataset from its attributes; what an older file does not say was the default."""
        return cls(
            attributes.get("probe_law", "rademacher"),
            attributes.get("probe_modes"),
            attributes.get("probe_translations", "keep"),
        )

    @property
    def is_isotropic(self) -> bool:
        """S is the identity, or the projector that takes translations out."""
        return self.name != "soft"

    def describe(self) -> str:
        """``E[v v^T]`` in words."""
        if self.name == "soft":
            modes = "all modes" if self.n_modes is None else f"the {self.n_modes} softest modes"
            return (
                f"of each frame: c * sum_k u_k u_k^T / lambda_k over {modes} u_k, stiffness lambda_k, of an elastic "
                f"network on its beads, rigid motions left out, c such that the trace is 3 B; springs r^-{SPRING_POWER}"
                f" between all beads, share {ISOTROPIC_SHARE} isotropic"
            )
        return "identity" if self.translations == "keep" else "projector onto displacements of zero mean over the beads"

    def compute_second_moments(self, positions: NDArray[Any]) -> NDArray[np.float64]:
        """S (n, 3B, 3B) of frames with beads at ``positions`` (n, B, 3), nm."""
        n_frames, n_beads = positions.shape[:2]
        if self.name == "soft":
            return np.stack([_raise_to(*self._find_variances(x), 1.0) for x in positions])
        moment = np.eye(3 * n_beads)
        if self.translations == "remove":
            moment -= np.kron(np.full((n_beads, n_beads), 1.0 / n_beads), np.eye(3))
        return np.broadcast_to(moment, (n_frames, *moment.shape))

    def compute_duals(self, positions: NDArray[Any], probes: NDArray[Any]) -> NDArray[np.float64] | None:
        """``S^+ v`` (n, P, B, 3) of probes, so that ``E[v dual^T]`` is the projector onto the range of S.

        None where that range leaves out more than rigid motions.
        """
        if self.name != "soft":
            return probes.astype(np.float64)
        if self.n_modes is not None:
            return None
        flat = probes.reshape(*probes.shape[:2], -1).astype(np.float64)
        inverses = [_raise_to(*self._find_variances(x), -1.0) for x in positions]
        return np.stack([v @ s for v, s in zip(flat, inverses, strict=True)]).reshape(probes.shape)

    def _find_variances(self, positions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Variances (m,), trace 3B, along the modes (3B, m) of one frame (B, 3)."""
        stiffness, modes = compute_soft_modes(positions)
        if self.n_modes is not None:
            if self.n_modes > len(stiffness):
                raise ConfigError(
                    f"{len(positions)} beads have fewer soft modes",
                    expected=f"at most {len(stiffness)}",
                    got=self.n_modes,
                    hint="ask for fewer in probe_modes, or for all with null",
                )
            stiffness, modes = stiffness[: self.n_modes], modes[:, : self.n_modes]
        return modes.shape[0] / stiffness / (1.0 / stiffness).sum(), modes


def draw_probes(
    law: ProbeLaw | str,
    frames: NDArray[np.int64],
    n_probes: int,
    n_beads: int,
    seed: int,
    positions: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Probes (n, P, B, 3), independent for each frame.

    A frame's probes depend on ``seed``, the frame's index and, for the soft law, its beads alone: whatever chunk,
    worker or order it is labelled in.

    Parameters
    ----------
    law : the law or its name
    frames : (n,) indices of the frames
    n_probes, n_beads, seed : P, B, and the seed of all frames
    positions : (n, B, 3) nm, beads of the frames; the soft law needs them

    Raises
    ------
    ConfigError
        No such law; too few beads for it; more soft modes asked for than there are.
    """
    law = ProbeLaw(law) if isinstance(law, str) else law
    remove = law.translations == "remove" and law.is_isotropic
    if n_beads < 2 and (remove or law.name == "soft"):
        raise ConfigError("one bead has nothing but translations to probe", hint="use rademacher and keep them")
    if law.name == "soft" and (positions is None or positions.shape != (len(frames), n_beads, 3)):
        got = "none" if positions is None else positions.shape
        raise ConfigError("soft probes need the beads of the frames", expected=(len(frames), n_beads, 3), got=got)
    if law.name == "rademacher":
        probes = draw_signs(seed, frames, n_probes * n_beads * 3).reshape(len(frames), n_probes, n_beads, 3)
        return _remove_translations(probes, seed, frames) if remove else probes
    probes = np.empty((len(frames), n_probes, n_beads, 3), dtype=np.float32)
    for i, frame in enumerate(frames.tolist()):
        drawn = np.random.default_rng([seed, frame]).standard_normal(probes[i].shape)
        if law.name == "soft":
            # The symmetric root: the signs of the modes and their order where they are alike do not matter.
            root = _raise_to(*law._find_variances(positions[i]), 0.5)  # type: ignore[index]
            drawn = (drawn.reshape(n_probes, -1) @ root).reshape(drawn.shape)
        probes[i] = drawn - drawn.mean(axis=1, keepdims=True) if remove else drawn
    return probes


def _remove_translations(signs: NDArray[np.float32], seed: int, frames: NDArray[np.int64]) -> NDArray[np.float32]:
    """Signs (n, P, B, 3) without their translation; probes that are nothing else are drawn again, on in the stream."""
    shape = signs.shape[1:]
    for i in np.flatnonzero((signs == signs[:, :, :1]).all(axis=(2, 3)).any(axis=1)):
        generator = np.random.default_rng([seed, int(frames[i])])
        drawn = 2.0 * generator.integers(0, 2, size=shape) - 1.0
        while (uniform := (drawn == drawn[:, :1]).all(axis=(1, 2))).any():
            drawn[uniform] = 2.0 * generator.integers(0, 2, size=(int(uniform.sum()), *shape[1:])) - 1.0
        signs[i] = drawn
    # The zero probes left out were a share 8^(1-B): this much smaller, the others have the projector as second moment.
    centred = signs.astype(np.float64)
    centred -= centred.mean(axis=2, keepdims=True)
    return (centred * np.sqrt(1.0 - 8.0 ** (1 - shape[1]))).astype(np.float32)


def compute_soft_modes(positions: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stiffness (m,), softest first, and modes (3B, m) of an elastic network, rigid motions left out.

    Springs at rest join all pairs of beads, of stiffness ``r^-6`` along their line and a tenth of that across it. The
    six rigid motions (five of beads on a line) are projected out exactly, so that m = 3B - 6 always. The unit of the
    stiffness is arbitrary.

    Parameters
    ----------
    positions : (B, 3) nm, B at least 2

    References
    ----------
    Atilgan et al., Biophys. J. 80, 505 (2001) (anisotropic network model); Hinsen et al., Chem. Phys. 261, 25 (2000)
    (springs of all distances, r^-6).
    """
    x = np.asarray(positions, dtype=np.float64)
    n_beads = len(x)
    difference = x[:, None] - x[None]
    squares = np.maximum((difference**2).sum(-1), SHORTEST_NM**2)
    strength = squares ** (-SPRING_POWER / 2) * (1.0 - np.eye(n_beads))
    line = difference[..., :, None] * difference[..., None, :] / squares[..., None, None]
    springs = strength[..., None, None] * ((1.0 - ISOTROPIC_SHARE) * line + ISOTROPIC_SHARE * np.eye(3))
    blocks = -springs
    blocks[np.arange(n_beads), np.arange(n_beads)] = springs.sum(axis=1)
    hessian = blocks.transpose(0, 2, 1, 3).reshape(3 * n_beads, 3 * n_beads)
    internal = _find_internal_motions(x)
    stiffness, modes = np.linalg.eigh(internal.T @ hessian @ internal)
    return stiffness, np.asarray(internal @ modes, dtype=np.float64)


def _find_internal_motions(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal basis (3B, m) of the displacements that neither move nor turn the molecule as a whole."""
    centred = positions - positions.mean(axis=0)
    turns = [np.cross(axis, centred).ravel() for axis in np.eye(3)]
    shifts = [np.tile(axis, len(positions)) for axis in np.eye(3)]
    scale = max(float(np.linalg.norm(turns)), np.finfo(float).tiny)
    rigid = np.stack([*(np.array(turns) / scale), *(np.array(shifts) / np.sqrt(len(positions)))], axis=1)
    directions, sizes, _ = np.linalg.svd(rigid, full_matrices=True)
    internal: NDArray[np.float64] = directions[:, int((sizes > LINE_TOLERANCE).sum()) :]
    return internal


def _raise_to(variances: NDArray[np.float64], modes: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """The power of S = sum_k variance_k u_k u_k^T on its range."""
    return (modes * variances**power) @ modes.T

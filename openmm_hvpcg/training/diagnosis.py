"""Are the labels enough for the network? A verdict in words from the figures of one training.

Three mean squares of each term of the loss are known: what the priors leave, what the network leaves on the frames it
was trained on, and on frames it never saw. The priors have too few parameters to learn noise, so that taking off
more on training frames than on others is the network fitting noise. For a fit that is linear in its parameters the
surplus is twice the variance (the optimism of Mallows, Technometrics 15, 661 (1973)); for one that is shrunk, or
stopped, where it does best on held-out frames it is twice the whole error that comes from having few and noisy labels,
variance and shrinkage together. Hence, with ``g`` the gain over the priors and half the surplus as the shortfall,

    shortfall = (g_training - g_validation) / 2,    reach = g_validation + shortfall,

``reach`` is what this network would gain from endless frames, and ``g_validation / reach`` the share it has learnt.
Best shrinkage of a signal S under a variance V of the unshrunk fit learns ``S / (S + V)``, and V falls as one over the
number of frames, so that a share ``t`` instead of ``a`` takes

    frames (1 / a - 1) / (1 / t - 1)

of the present ones. The assumptions: frames independent and like those there are; the network linear enough near its
best; training ended by validation rather than by ``max_epochs``. The held-out frames chose the best epoch, and look a
little too good for it: the numbers lean towards too few. What a network of this kind cannot express is no part
of ``reach``: more frames would not mend it. Where the noise of the labels could be estimated it shows how much that is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from openmm_hvpcg.config import TrainingSettings

#: Share of what a network of this kind could take off the priors' error that counts as enough.
TARGET = 0.9
#: An error is resolved where it is so many standard errors.
RESOLVED = 2.0
#: A training whose loss rises to so many times that of the priors alone has run away.
RAN_AWAY = 3.0
#: Least factor named where nothing was learnt: the rule's for a network that has learnt half.
NOTHING_LEARNT = 1.0 / (1.0 / TARGET - 1.0)

Verdict = Literal["enough", "too few", "nothing learnt", "cannot tell", "not trained on"]


@dataclass(frozen=True)
class TermFigures:
    """Mean squares per component of one term of the loss, as the loss sees it.

    ``training``, ``validation`` : what the network leaves of the labels on either set
    ``priors_training``, ``priors_validation`` : what the priors leave
    ``noise`` : of the labels; None where unknown
    ``validation_error`` : standard error of ``validation``
    ``gain_error`` : standard error of ``priors_validation - validation``
    """

    training: float
    validation: float
    priors_training: float
    priors_validation: float
    noise: float | None
    validation_error: float
    gain_error: float

    @property
    def gain(self) -> float:
        """What the network takes off the priors' mean square on held-out frames."""
        return self.priors_validation - self.validation

    @property
    def shortfall(self) -> float:
        """What it fails to take off for want of frames (see the module); noise can make it negative."""
        return 0.5 * (self.priors_training - self.training - self.gain)

    @property
    def reach(self) -> float:
        """What a network of this kind would take off with endless frames."""
        return self.gain + self.shortfall


@dataclass(frozen=True)
class TermDiagnosis:
    """What the figures say of one term; None: unknown.

    ``noise`` : root mean square of the labels' noise, kJ/mol/nm or kJ/mol/nm^2
    ``irreducible`` : share of the validation loss that is noise, 0 to 1
    ``error`` : the network's error with the noise taken out, same unit, and its standard error ``error_uncertainty``;
        where that resolves nothing, ``error_is_bound`` and ``error`` is what it lies below
    ``explained`` : share of what the priors leave beside noise that the network takes off, 0 to 1
    ``learnt`` : share of what a network of this kind could take off, and its standard error ``learnt_error``
    ``n_frames_needed`` : labelled frames, held-out ones included, for ``TARGET`` of that; ``is_lower_bound``: at least
    """

    verdict: Verdict
    noise: float | None
    irreducible: float | None
    error: float | None
    error_uncertainty: float | None
    error_is_bound: bool
    explained: float | None
    learnt: float | None
    learnt_error: float | None
    n_frames_needed: int | None
    is_lower_bound: bool


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a training, with its reasons in words.

    ``n_frames`` : labelled frames there are; ``target`` : share counted as enough
    ``irreducible`` : share of the weighted validation loss that is noise; None: unknown
    ``weights`` : the weights chosen, and why, a sentence each
    ``remarks`` : how the training went, a sentence each
    ``warning`` : what is wrong with the labels, and the frames that would do; None: nothing
    """

    n_frames: int
    target: float
    force: TermDiagnosis
    hvp: TermDiagnosis
    irreducible: float | None
    weights: tuple[str, ...]
    remarks: tuple[str, ...]
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def diagnose(metrics: Mapping[str, Any], settings: TrainingSettings, own_shares: Mapping[str, float]) -> Diagnosis:
    """Judge a finished training.

    Parameters
    ----------
    metrics : of :class:`~openmm_hvpcg.training.fit.FitResult`, ``loss_terms`` among them
    settings : of the training
    own_shares : by molecule, the share of a frame's own residual in the covariance of its HVP target
    """
    n_frames = metrics["n_frames"] + metrics["n_validation_frames"]
    figures = {name: TermFigures(**metrics["loss_terms"][name]) for name in ("force", "hvp")}
    weights = {name: float(metrics[f"{name}_weight"]) for name in figures}
    terms = {
        name: diagnose_term(
            figures[name],
            n_frames,
            is_trained_on=weights[name] > 0,
            error=_compute_error(
                metrics[f"{name}_rmse_validation"],
                metrics[f"{name}_rmse_validation_error"],
                metrics[f"{name}_noise"],
            ),
            noise=metrics[f"{name}_noise"],
        )
        for name in figures
    }
    return Diagnosis(
        n_frames,
        TARGET,
        terms["force"],
        terms["hvp"],
        _compute_irreducible(figures, weights),
        describe_weights(settings, weights["hvp"], own_shares),
        _describe_course(metrics, settings),
        " ".join(text for text in (_warn_of_course(metrics, settings), _warn(terms, n_frames)) if text) or None,
    )


def diagnose_term(
    figures: TermFigures,
    n_frames: int,
    *,
    is_trained_on: bool = True,
    error: tuple[float | None, float | None, bool] = (None, None, False),
    noise: float | None = None,
) -> TermDiagnosis:
    """Judge one term: see :class:`TermDiagnosis`, and the module for the rule."""
    irreducible = explained = None
    if figures.noise is not None and figures.validation > 0:
        irreducible = min(figures.noise / figures.validation, 1.0)
        left = figures.priors_validation - figures.noise
        if left > RESOLVED * figures.validation_error:
            explained = min(max(figures.gain / left, 0.0), 1.0)
    verdict, learnt, spread, factor = _judge(figures) if is_trained_on else ("not trained on", None, None, None)
    return TermDiagnosis(
        verdict,
        noise,
        irreducible,
        *error,
        explained,
        learnt,
        spread,
        None if factor is None else round_up(n_frames * factor),
        verdict == "nothing learnt",
    )


def _judge(figures: TermFigures) -> tuple[Verdict, float | None, float | None, float | None]:
    """Verdict, share learnt, its standard error, and the factor by which frames fall short."""
    if figures.gain <= figures.gain_error:
        return "nothing learnt", None, None, NOTHING_LEARNT
    learnt = min(figures.gain / max(figures.reach, figures.gain), 1.0)
    # From learnt = 2 g / (g + g_training), where g alone is uncertain: training frames are many more.
    shortfall_error = 0.5 * figures.gain_error
    spread = shortfall_error * (2.0 - learnt) * learnt / figures.gain
    if learnt < TARGET and figures.shortfall > shortfall_error:
        return "too few", learnt, spread, (1.0 / learnt - 1.0) / (1.0 / TARGET - 1.0)
    if spread > 1.0 - TARGET:
        return "cannot tell", learnt, spread, (spread / (1.0 - TARGET)) ** 2
    return "enough", learnt, spread, None


def round_up(number: float) -> int:
    """To two leading digits, upwards: a number of frames is no more certain."""
    if number < 100:
        return math.ceil(number)
    unit = 10 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit - 1e-9) * unit


def describe_weights(settings: TrainingSettings, hvp_weight: float, own_shares: Mapping[str, float]) -> tuple[str, ...]:
    """The weights of the loss in force and the reason of each, a sentence each.

    Parameters
    ----------
    settings : of the training
    hvp_weight : the weight of the HVP term as a number
    own_shares : by molecule, the share of a frame's own residual in the covariance of its HVP target
    """
    lines = [
        f"Force weight {settings.force_weight:.3g}, HVP weight {hvp_weight:.3g}; each term is first divided by what the"
        " priors alone leave of it, so that equal weights count both alike."
    ]
    if hvp_weight == 0:
        lines.append("The HVPs take no part in the loss (force matching); their figures are for comparison.")
    elif settings.hvp_weight == "balanced":
        is_averaged = bool(own_shares) and set(own_shares.values()) == {0.0}
        noise, meaning = (
            ("s)", ", and s the variance of forces over the inner samples") if is_averaged else ("m_F)", "")
        )
        lines.append(
            f"The HVP weight is balanced: w_H = w_F m_H / (2 beta² m_F {noise}, with m_F and m_H the mean squares that"
            f" the priors leave{meaning}. Noise of variance s in the forces makes noise of variance 2 (beta s)² in the"
            " covariance of an HVP target, and so each term counts by the information its noise leaves in it."
        )
    else:
        lines.append("The HVP weight is the number the protocol gives.")
    if hvp_weight > 0:
        if settings.hvp_start > 0:
            first = int(settings.hvp_start * settings.max_epochs)
            lines.append(
                f"HVPs count from epoch {first + 1} of {settings.max_epochs} on (hvp_start {settings.hvp_start:g}): the"
                " bias of their targets is of second order in the force error, so that forces come first."
            )
        if settings.hvp_along != "all":
            where = {"bonds": "bonds", "angles": "bonds and angles"}[settings.hvp_along]
            lines.append(
                f"HVPs are matched along {where} alone (hvp_along): in other directions the error of their covariances"
                " is as large as the curvature."
            )
        lines += [_describe_covariance(name, share, settings) for name, share in own_shares.items()]
    if settings.density > 0:
        lines.append(
            f"Mean forces are learnt to {100 * settings.density:.3g} % from the density of the frames, the rest from"
            " projected forces; along bonds from forces alone."
        )
    if settings.whiten == "noise":
        lines.append(
            "Residuals count by the noise of their direction (whiten: noise), so that stiff ones do not drown."
        )
    return tuple(lines)


def _describe_covariance(molecule: str, own_share: float, settings: TrainingSettings) -> str:
    lead = f"Covariance in the HVP targets of {molecule}:"
    if own_share == 0.0:
        return f"{lead} from the inner samples of conditional averaging, which know nothing of the model."
    if own_share == 1.0:
        return f"{lead} each frame's own force residual alone, free of bias and noisy."
    return (
        f"{lead} {100 * own_share:.2g} % each frame's own force residual, free of bias and noisy;"
        f" {100 * (1 - own_share):.2g} % that of frames alike, nearly free of noise and a little biased. The more"
        f" training frames, the more the own share: half at {settings.covariance_frames:g}."
    )


def _describe_course(metrics: Mapping[str, Any], settings: TrainingSettings) -> tuple[str, ...]:
    """What the course of the training says."""
    lines = []
    best, epochs, share = int(metrics["best_epoch"]) + 1, int(metrics["epochs"]), float(metrics["network_share"])
    if epochs >= settings.max_epochs and best > 0.95 * epochs:
        lines.append(
            f"Validation was still improving when training ended (best epoch {best} of {epochs}): raise max_epochs"
            " before anything else."
        )
    elif best <= 0.2 * epochs:
        lines.append(f"The best epoch came early ({best} of {epochs}): from there on the network learnt noise.")
    if share < 0.995:
        lines.append(
            f"{100 * share:.2g} % of the network's energy was kept, the share that is best on held-out frames: the rest"
            " was noise it had learnt."
        )
    return tuple(lines)


def _warn_of_course(metrics: Mapping[str, Any], settings: TrainingSettings) -> str | None:
    """The warning of a training that ran away, None where it did not."""
    peak = float(metrics.get("peak_loss") or 0.0)
    if peak <= RAN_AWAY:
        return None
    frame = float(metrics["hvp_weight"]) > 0 and settings.covariance == "frame"
    cure = (
        ", training.hvp_weight, or take training.covariance: pooled, whose targets the model moves less"
        if frame
        else ""
    )
    return (
        f"The training ran away: the loss of an epoch was {peak:.3g} times that of the priors alone. Lower"
        f" training.learning_rate{cure}."
    )


def _compute_error(rmse: float, rmse_error: float, noise: float | None) -> tuple[float | None, float | None, bool]:
    """Error with the noise taken out, its standard error, and whether it is but a bound (two standard errors)."""
    if noise is None:
        return None, None, False
    left, spread = rmse**2 - noise**2, 2.0 * rmse * rmse_error
    if left > RESOLVED * spread:
        return math.sqrt(left), 0.5 * spread / math.sqrt(left), False
    return math.sqrt(max(left, 0.0) + RESOLVED * spread), None, True


def _compute_irreducible(figures: Mapping[str, TermFigures], weights: Mapping[str, float]) -> float | None:
    """Share of the weighted validation loss that is noise."""
    noise = loss = 0.0
    for name, term in figures.items():
        if weights[name] == 0 or term.priors_training == 0:
            continue
        if term.noise is None:
            return None
        noise += weights[name] * term.noise / term.priors_training
        loss += weights[name] * term.validation / term.priors_training
    return min(noise / loss, 1.0) if loss > 0 else None


def _warn(terms: Mapping[str, TermDiagnosis], n_frames: int) -> str | None:
    """The warning of all terms whose labels do not do, None where they do."""
    said = [_complain(name, term, n_frames) for name, term in terms.items()]
    found = [text for text in said if text]
    if not found:
        return None
    return " ".join([f"The labels of {n_frames:,} frames are too few or too noisy for this network.", *found])


def _complain(name: str, term: TermDiagnosis, n_frames: int) -> str | None:
    if term.n_frames_needed is None:
        return None
    subject = {"force": "Forces", "hvp": "HVPs"}[name]
    needed = f"{term.n_frames_needed:,} frames"
    if term.verdict == "nothing learnt":
        return (
            f"{subject}: on held-out frames the network is no better than the priors alone, beyond chance; {needed}"
            " at least, or labels with less noise (force map, conditional averaging), would do."
        )
    if term.learnt is None or term.learnt_error is None:
        return None
    share = f"{100 * term.learnt:.0f} ± {100 * term.learnt_error:.0f} %"
    if term.verdict == "cannot tell":
        return (
            f"{subject}: the held-out frames are too few to tell how much the network has learnt ({share} of what it"
            f" could); about {needed} would show it."
        )
    return (
        f"{subject}: the network has learnt {share} of what it could; about {needed}, or labels with"
        f" {max(2, round(term.n_frames_needed / n_frames))} times less noise variance (force map, conditional"
        f" averaging), would bring that to {100 * TARGET:.0f} %."
    )

"""A whole protocol, and the settings of one of its arms."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from openmm_hvpcg.config.atomistic import MoleculeSettings, SamplingSettings
from openmm_hvpcg.config.base import Settings
from openmm_hvpcg.config.labels import LabelSettings, MappingSettings, ReferenceSettings
from openmm_hvpcg.config.problems import explain, suggest
from openmm_hvpcg.config.production import AnalysisSettings, ExportSettings, SimulationSettings
from openmm_hvpcg.config.training import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import ConfigError


class Protocol(Settings):
    """A whole study."""

    temperature_K: float = Field(300.0, gt=0, le=2000)
    molecules: list[MoleculeSettings] = Field(min_length=1)
    sampling: SamplingSettings = SamplingSettings()
    mapping: MappingSettings = MappingSettings()
    labels: LabelSettings = LabelSettings()
    reference: ReferenceSettings | None = None
    priors: PriorSettings = PriorSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    export: ExportSettings = ExportSettings()
    simulation: SimulationSettings = SimulationSettings()
    analysis: AnalysisSettings = AnalysisSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        names = [m.name for m in self.molecules]
        if len(set(names)) != len(names):
            raise ValueError(f"molecules need distinct names, got {names}")
        if self.sampling.walkers > self.sampling.n_frames:
            raise ValueError(
                f"sampling: fewer frames ({self.sampling.n_frames}) than walkers ({self.sampling.walkers})"
            )
        if all(m.role == "test" for m in self.molecules):
            raise ValueError("no molecule to train on: give at least one the role train or both")
        compared = [m for m in self.molecules if m.role != "train"] or self.molecules
        self._check_flattening()
        biased = {m.name: words for m in self.molecules if (words := self._explain_bias(m))}
        wrong = next((m.name for m in compared if m.name in biased), None)
        if wrong is not None:
            raise ValueError(
                f"molecule {wrong} is compared with, and frames {biased[wrong]} are not distributed as its ensemble"
                " is: give it the role train, and the role test to a molecule with frames sampled or chosen by time"
                " (the same input under another name will do)"
            )
        exchange = self.simulation.exchange
        if exchange is not None and exchange.hottest_K <= self.temperature_K:
            raise ValueError(
                f"simulation.exchange.hottest_K ({exchange.hottest_K:g}) is not above temperature_K"
                f" ({self.temperature_K:g})"
            )
        for arm in self.training.arms:
            training, _ = resolve_arm(self, arm.name)
            for name, words in biased.items():
                if training.density > 0:
                    raise ValueError(
                        f"arm {arm.name} learns from the density of the frames (training.density), and frames of"
                        f" molecule {name} {words} are not distributed as its ensemble is: take them by time and"
                        " without a bias, or leave density out"
                    )
        return self

    def _explain_bias(self, molecule: MoleculeSettings) -> str | None:
        """What keeps frames of the molecule from being distributed as its ensemble is, if anything does."""
        if molecule.input.trajectory_choice == "cluster":
            return "chosen by cluster"
        return "sampled with a bias (sampling.flatten)" if self.is_flattened(molecule) else None

    def _check_flattening(self) -> None:
        """A bias needs molecules that are sampled, and only trained on."""
        if self.sampling.flatten == 0:
            return
        if not any(self.is_flattened(m) for m in self.molecules):
            raise ValueError(
                "sampling.flatten acts on molecules that are sampled and only trained on, and there is none: give one"
                " the role train (the same input may have the role test under another name)"
            )
        if self.sampling.flatten_frames < self.sampling.walkers:
            raise ValueError(
                f"sampling: fewer frames without the bias (flatten_frames, {self.sampling.flatten_frames}) than walkers"
                f" ({self.sampling.walkers})"
            )

    def is_flattened(self, molecule: MoleculeSettings) -> bool:
        """Whether frames of the molecule are sampled with a bias."""
        return self.sampling.flatten > 0 and molecule.role == "train" and molecule.input.trajectory is None


def resolve_arm(protocol: Protocol, name: str) -> tuple[TrainingSettings, ModelSettings]:
    """Training and model settings of one arm, its overrides applied.

    Raises
    ------
    ConfigError
        No such arm, or an override that is not a key of ``training`` or ``model`` or has a wrong value.
    """
    arm = next((a for a in protocol.training.arms if a.name == name), None)
    if arm is None:
        raise ConfigError("no such arm", expected=[a.name for a in protocol.training.arms], got=name)
    training = protocol.training.model_dump()
    training["arms"] = [{"name": name}]
    model = protocol.model.model_dump()
    for key, value in (arm.model_extra or {}).items():
        if key in ModelSettings.model_fields:
            model[key] = value
        elif key in TrainingSettings.model_fields and key != "arms":
            training[key] = value
        else:
            known = [*ModelSettings.model_fields, *TrainingSettings.model_fields]
            raise ConfigError(f"arm {name}: unknown key {key!r}{suggest(key, known)}")
    try:
        resolved = TrainingSettings.model_validate(training), ModelSettings.model_validate(model)
    except ValidationError as error:
        raise ConfigError(f"arm {name}: {explain(error, TrainingSettings)}") from error
    if resolved[0].force_weight == resolved[0].hvp_weight == 0:
        raise ConfigError(f"arm {name}: force_weight and hvp_weight are both 0, so nothing is trained")
    return resolved

"""The protocol YAML: one validated model per section, every default in sight.

:func:`load_protocol` reads a file, applies ``--set`` overrides and returns a :class:`Protocol`. Anything
wrong is a :class:`~openmm_hvpcg.errors.ConfigError` of one line that names the key; an unknown key names the
closest known one.
"""

from openmm_hvpcg.config.atomistic import (
    INPUT_BEFORE,
    SAMPLING_BEFORE,
    InputSettings,
    MoleculeSettings,
    SamplingSettings,
)
from openmm_hvpcg.config.base import Settings
from openmm_hvpcg.config.labels import (
    LABELS_BEFORE,
    REFERENCE_BEFORE,
    AveragingSettings,
    LabelSettings,
    MappingSettings,
    ReferenceSettings,
)
from openmm_hvpcg.config.production import AnalysisSettings, ExchangeSettings, ExportSettings, SimulationSettings
from openmm_hvpcg.config.protocol import Protocol, resolve_arm
from openmm_hvpcg.config.reading import describe_defaults, dump_protocol, load_protocol, validate_protocol
from openmm_hvpcg.config.training import (
    MODEL_BEFORE,
    PRIORS_BEFORE,
    TRAINING_BEFORE,
    TRAINING_FREE,
    ArmSettings,
    ModelSettings,
    PriorSettings,
    TrainingSettings,
)

__all__ = [
    "INPUT_BEFORE",
    "LABELS_BEFORE",
    "MODEL_BEFORE",
    "PRIORS_BEFORE",
    "REFERENCE_BEFORE",
    "SAMPLING_BEFORE",
    "TRAINING_BEFORE",
    "TRAINING_FREE",
    "AnalysisSettings",
    "ArmSettings",
    "AveragingSettings",
    "ExchangeSettings",
    "ExportSettings",
    "InputSettings",
    "LabelSettings",
    "MappingSettings",
    "ModelSettings",
    "MoleculeSettings",
    "PriorSettings",
    "Protocol",
    "ReferenceSettings",
    "SamplingSettings",
    "Settings",
    "SimulationSettings",
    "TrainingSettings",
    "describe_defaults",
    "dump_protocol",
    "load_protocol",
    "resolve_arm",
    "validate_protocol",
]

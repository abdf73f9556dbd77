"""The protocol YAML: the contract, every default, and one clear line for everything that is wrong."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from openmm_hvpcg import config
from openmm_hvpcg.config import Protocol, load_protocol, resolve_arm, validate_protocol
from openmm_hvpcg.errors import ConfigError

#: Word for word from the issue that fixed the contract.
CONTRACT = """\
    temperature_K: 300
    molecules:
      - name: ala
        role: train                    # train | test | both: a test molecule is sampled, simulated and compared, never trained on
        input: {sequence: A, caps: true, start: extended, force_field: amber14, solvent: obc2}
      - {name: b, input: {pdb: b.pdb, force_field: [amber14-all.xml], solvent: obc2, hydrogen_mass_amu: 1.5}}
      - {name: c, input: {prmtop: c.prmtop, coordinates: c.rst7, solvent: obc2}}
      - {name: d, input: {system_xml: d.xml, pdb: d.pdb}}
      - {name: e, input: {pdb: e.pdb, solvent: explicit, trajectory: [e1.dcd, e2.dcd]}}     # frames from files, not sampled
    sampling: {n_frames: 4000, stride: 250, timestep_fs: 2, walkers: 2, equilibration_steps: 20000, constraints: hbonds, platform: auto, seed: 1}
    mapping: {beads: ca}               # a preset, an mdtraj selection, or {json: map.json}
    labels: {force_map: optimal, probes_per_frame: 4, probe_law: rademacher, step_nm: auto, platform: auto, workers: auto, seed: 2}
    priors: {bonds: true, angles: true, dihedrals: true, repulsion: true}
    model: {kind: schnet, features: 64, interactions: 2, radial: 20, cutoff_nm: 1.2}
    training:
      arms: [{name: fm, hvp_weight: 0.0}, {name: hvp, hvp_weight: 1.0}]    # an arm may override any key of this section and of model
      batch_size: 64
      learning_rate: 1.0e-3
      max_epochs: 200
      validation_fraction: 0.2
      seed: 3
    simulation: {replicas: 8, n_steps: 100000, timestep_fs: 4, friction_per_ps: 1, save_every: 100, backend: auto, priors: native, seed: 4}
    analysis: {features: distances, lag_frames: 10, bins: 50}
"""  # noqa: E501

MINIMAL: dict[str, Any] = {"molecules": [{"name": "ala", "input": {"sequence": "A"}}]}

DEFAULTS: dict[str, Any] = {
    "temperature_K": 300.0,
    "molecules": [
        {
            "name": "ala",
            "role": "both",
            "input": {
                "sequence": "A",
                "caps": True,
                "start": "extended",
                "pdb": None,
                "prmtop": None,
                "top": None,
                "include_folder": None,
                "psf": None,
                "parameters": None,
                "coordinates": None,
                "box_nm": None,
                "system_xml": None,
                "remove": [],
                "replace": [],
                "repair": True,
                "ph": 7.0,
                "force_field": "amber14",
                "solvent": "obc2",
                "hydrogen_mass_amu": None,
                "padding_nm": 1.0,
                "ionic_strength_molar": 0.0,
                "trajectory": None,
                "trajectory_interval_ps": None,
                "trajectory_stride": 1,
                "trajectory_frames": None,
                "trajectory_choice": "time",
            },
            "native_pdb": None,
        }
    ],
    "sampling": {
        "n_frames": 4000,
        "stride": 250,
        "timestep_fs": 2.0,
        "friction_per_ps": 1.0,
        "walkers": 2,
        "walkers_in": "auto",
        "equilibration_steps": 20000,
        "constraints": "hbonds",
        "flexible_beads": False,
        "flatten": 0.0,
        "flatten_frames": 400,
        "platform": "auto",
        "precision": "auto",
        "seed": 1,
    },
    "mapping": {"beads": "ca", "ends": False, "share_backbone": False},
    "labels": {
        "force_map": "optimal_cv",
        "probes_per_frame": 4,
        "probe_law": "rademacher",
        "probe_modes": None,
        "probe_translations": "keep",
        "averaging": None,
        "step_nm": "auto",
        "max_frames": None,
        "platform": "auto",
        "precision": "auto",
        "workers": "auto",
        "seed": 2,
    },
    "reference": None,
    "priors": {
        "bonds": True,
        "angles": True,
        "dihedrals": True,
        "repulsion": True,
        "angle_walls": True,
        "min_molecules": 2,
    },
    "model": {
        "kind": "schnet",
        "features": 64,
        "interactions": 2,
        "radial": 20,
        "cutoff_nm": 1.2,
        "torsions": True,
        "chiral_channels": 0,
        "options": None,
    },
    "training": {
        "arms": [{"name": "fm", "hvp_weight": 0.0}, {"name": "hvp", "hvp_weight": 1.0}],
        "force_weight": 1.0,
        "hvp_weight": 0.0,
        "hvp_start": 0.0,
        "covariance": "auto",
        "covariance_frames": 50000.0,
        "covariance_regions": 4,
        "whiten": "none",
        "density": 0.0,
        "hvp_along": "all",
        "committee": 1,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "schedule": "plateau",
        "weight_decay": 0.0,
        "weight_averaging": 0.0,
        "gradient_clip": 1.0,
        "max_epochs": 200,
        "patience": 20,
        "frames_per_molecule": None,
        "validation_fraction": 0.2,
        "validation_blocks": 5,
        "accelerator": "auto",
        "devices": 1,
        "hosts": [],
        "launch": "ssh {host}",
        "memory_gb": None,
        "seed": 3,
    },
    "export": {"tabulate": "auto"},
    "simulation": {
        "replicas": 32,
        "exchange": None,
        "n_steps": 100000,
        "timestep_fs": 4.0,
        "friction_per_ps": 1.0,
        "save_every": 100,
        "trajectory_format": "dcd",
        "backend": "auto",
        "priors": "native",
        "platform": "auto",
        "seed": 4,
    },
    "analysis": {"features": "distances", "lag_frames": 10, "bins": 50, "burn_in": 0.1, "blocks": 5},
}


def change(key: str, value: Any) -> dict[str, Any]:
    """``MINIMAL`` with one dotted key set."""
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = key.split(".")
    node: Any = content
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return content


def load(tmp_path: Path, text: str, *overrides: str) -> Protocol:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    return load_protocol(tmp_path / "p.yaml", overrides)


def explain(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_protocol(content, where="p.yaml")
    text = str(caught.value)
    assert text.startswith("p.yaml: ")
    assert "\n" not in text
    assert "pydantic" not in text
    return text


class TestContract:
    def test_validates_verbatim(self, tmp_path: Path) -> None:
        protocol = load(tmp_path, CONTRACT)
        assert [m.name for m in protocol.molecules] == ["ala", "b", "c", "d", "e"]
        assert [m.role for m in protocol.molecules] == ["train", "both", "both", "both", "both"]
        assert protocol.molecules[1].input.force_field == ["amber14-all.xml"]
        assert protocol.molecules[4].input.trajectory == ["e1.dcd", "e2.dcd"]
        assert protocol.training.learning_rate == 1e-3

    def test_its_values_are_the_defaults(self, tmp_path: Path) -> None:
        # But for the force map, which the study of issue 3 showed another one to be better than, and the replicas: 32
        # of 6 beads cost twice the time of 8.
        changes = ("labels.force_map=optimal_cv", "simulation.replicas=32")
        sections = load(tmp_path, CONTRACT, *changes).model_dump(exclude={"molecules"})
        assert sections == {k: v for k, v in DEFAULTS.items() if k != "molecules"}

    @pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("protocols/*/protocol.yaml")))
    def test_protocols_of_the_package(self, path: Path) -> None:
        assert {"fm", "hvp"} <= {arm.name for arm in load_protocol(path).training.arms}


class TestDefaults:
    def test_every_default(self) -> None:
        assert validate_protocol(MINIMAL).model_dump() == DEFAULTS

    def test_described_in_full(self) -> None:
        text = config.describe_defaults()
        content = yaml.safe_load(text)
        described = content["molecules"][0]
        assert described.pop("name") == "NAME"
        expected = {k: v for k, v in DEFAULTS["molecules"][0].items() if k != "name"}
        assert described == {**expected, "input": {**expected["input"], "sequence": None}}
        assert {k: v for k, v in content.items() if k != "molecules"} == {
            k: v for k, v in DEFAULTS.items() if k != "molecules"
        }

    def test_description_is_a_protocol_once_it_has_a_molecule(self, tmp_path: Path) -> None:
        protocol = load(tmp_path, config.describe_defaults(), "molecules.0.input.sequence=A", "molecules.0.name=ala")
        assert protocol == validate_protocol(MINIMAL)

    def test_every_description_is_shown(self) -> None:
        text = config.describe_defaults()
        sections = [f.annotation for k, f in Protocol.model_fields.items() if k not in ("temperature_K", "molecules")]
        sections += [config.InputSettings, config.ReferenceSettings, config.ExchangeSettings]
        described = [
            field.description
            for section in sections
            if isinstance(section, type) and issubclass(section, BaseModel)
            for field in section.model_fields.values()
            if field.description
        ]
        assert len(described) > 25
        assert all(f"# {description}" in text for description in described)


class TestExchange:
    def test_replicas_are_its_temperatures(self) -> None:
        simulation = validate_protocol(change("simulation.exchange", {})).simulation
        assert (simulation.replicas, simulation.exchange) == (6, config.ExchangeSettings())
        assert validate_protocol(change("simulation.exchange", {"temperatures": 4})).simulation.replicas == 4

    def test_comes_back_from_what_a_study_writes(self, tmp_path: Path) -> None:
        protocol = validate_protocol(change("simulation.exchange.temperatures", 4))
        assert load(tmp_path, config.dump_protocol(protocol)) == protocol


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("key", "closest"),
        [
            ("temperature", "temperature_K"),
            ("molecule", "molecules"),
            ("simulations", "simulation"),
            ("sampling.n_frame", "n_frames"),
            ("mapping.bead", "beads"),
            ("labels.probes_frame", "probes_per_frame"),
            ("priors.angle", "angles"),
            ("model.cutoff", "cutoff_nm"),
            ("training.learn_rate", "learning_rate"),
            ("reference.n_sample", "n_samples"),
            ("simulation.timestep", "timestep_fs"),
            ("simulation.exchange.hotest_K", "hottest_K"),
            ("analysis.lagframes", "lag_frames"),
            ("molecules.0.roles", "role"),
            ("molecules.0.input.sequnce", "sequence"),
            ("molecules.0.input.hydrogen_mass", "hydrogen_mass_amu"),
        ],
    )
    def test_names_the_closest(self, key: str, closest: str) -> None:
        assert f"unknown key {key!r}; did you mean {closest!r}?" in explain(change(key, 1))

    @pytest.mark.parametrize(
        ("key", "closest"), [("hvp_wieght", "hvp_weight"), ("feature", "features"), ("cutof_nm", "cutoff_nm")]
    )
    def test_in_an_arm(self, key: str, closest: str) -> None:
        text = explain(change("training.arms", [{"name": "fm"}, {"name": "x", key: 1}]))
        assert f"arm x: unknown key {key!r}; did you mean {closest!r}?" in text

    def test_without_a_close_one_lists_all(self) -> None:
        assert "known keys: bonds, angles, dihedrals, repulsion" in explain(change("priors.zzzz", 1))

    def test_a_key_that_is_no_text(self) -> None:
        assert "7: keys should be strings, got 7" in explain({**MINIMAL, 7: 1})  # type: ignore[dict-item]

    def test_several_problems_in_one_line(self) -> None:
        text = explain({**change("sampling.n_frame", 1), "model": {"features": -1}})
        assert "n_frame" in text
        assert "model.features" in text


class TestWrongValues:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("temperature_K", "warm", "temperature_K: .*number, got 'warm'"),
            ("temperature_K", 0, "temperature_K: .*greater than 0, got 0"),
            ("temperature_K", -300, "greater than 0"),
            ("temperature_K", float("nan"), "temperature_K: .*finite"),
            ("temperature_K", float("inf"), "temperature_K: "),
            ("temperature_K", True, "temperature_K: expected no true or false, got True"),
            ("temperature_K", [300], "temperature_K: .*number"),
            ("molecules", [], "molecules: .*at least 1"),
            ("molecules", "ala", "molecules: .*list"),
            ("molecules.0.name", "a b", "molecules.0.name: .*pattern"),
            ("molecules.0.name", "../up", "molecules.0.name: .*pattern"),
            ("molecules.0.name", "a\n", "molecules.0.name: .*pattern"),
            ("molecules.0.role", "testing", "molecules.0.role: .*'train', 'test' or 'both', got 'testing'"),
            ("molecules.0.input", None, "molecules.0.input: .*section with keys, got None"),
            ("molecules.0.input.start", "coil", "input.start: .*'extended' or 'helix', got 'coil'"),
            ("molecules.0.input.solvent", "water", "input.solvent: "),
            ("molecules.0.input.caps", "perhaps", "input.caps: "),
            ("molecules.0.input.hydrogen_mass_amu", 12, "hydrogen_mass_amu: .*less than or equal to 4, got 12"),
            ("molecules.0.input.force_field", 3, "input.force_field: .*string"),
            ("molecules.0.input.force_field", [3], "input.force_field"),
            ("sampling", 3, "sampling: "),
            ("sampling.n_frames", 0, "sampling.n_frames: .*greater than or equal to 1, got 0"),
            ("sampling.n_frames", 10.5, "sampling.n_frames: .*integer"),
            ("sampling.n_frames", True, "sampling.n_frames: expected no true or false"),
            ("sampling.n_frames", None, "sampling.n_frames: .*integer"),
            ("sampling.n_frames", 1, r"sampling: fewer frames \(1\) than walkers \(2\)"),
            ("sampling.timestep_fs", 11, "sampling.timestep_fs: "),
            ("sampling.constraints", "all", "sampling.constraints: "),
            ("sampling.precision", "half", "sampling.precision: "),
            ("sampling.seed", -1, "sampling.seed: "),
            ("sampling.seed", 2**31, "sampling.seed: "),
            ("mapping.beads", {"file": "a.json"}, r"mapping.beads: expected a preset, .* or \{json: FILE\}"),
            ("mapping.beads", {"json": "a", "x": "b"}, "mapping.beads: expected a preset"),
            ("mapping.beads", 3, "mapping.beads: "),
            ("mapping", {"beads": {"json": "a"}, "ends": True}, "mapping: ends: a JSON map names the species"),
            (
                "mapping",
                {"beads": {"json": "a"}, "share_backbone": True},
                "mapping: share_backbone: a JSON map names the species",
            ),
            ("reference", {"ladder_K": [500, 400]}, r"reference.ladder_K: expected temperatures upwards, got \[500"),
            ("reference", {"ladder_K": [-1]}, "reference.ladder_K: expected temperatures upwards"),
            ("labels.force_map", "best", "labels.force_map: "),
            ("labels.probes_per_frame", 0, "labels.probes_per_frame: "),
            ("labels.step_nm", 0.5, "labels.step_nm: expected auto or 1e-8 to 0.05 nm"),
            ("labels.step_nm", 0, "labels.step_nm: expected auto"),
            ("labels.step_nm", "automatic", "labels.step_nm: "),
            ("labels.workers", 0, "labels.workers: expected auto or at least 1"),
            ("labels.workers", 1.5, "labels.workers: "),
            ("labels.workers", True, "labels.workers: expected no true or false"),
            ("labels.max_frames", 0, "labels.max_frames: "),
            ("sampling.flexible_beads", "perhaps", "sampling.flexible_beads: "),
            ("simulation.exchange", 3, "simulation.exchange: .*section with keys, got 3"),
            ("simulation.exchange.temperatures", 1, "exchange.temperatures: .*greater than or equal to 2"),
            ("simulation.exchange.temperatures", "six", "exchange.temperatures: .*integer"),
            ("simulation.exchange.hottest_K", 300, r"hottest_K \(300\) is not above temperature_K \(300\)"),
            ("simulation.exchange.every", 70, r"save_every \(100\) is no multiple of exchange.every \(70\)"),
            ("simulation", {"exchange": {}, "n_steps": 101}, r"n_steps \(101\) is no multiple of exchange.every"),
            ("simulation", {"exchange": {}, "replicas": 8}, "one copy at each of its 6 temperatures: .*got 8"),
            ("reference", 3, "reference: .*section with keys, got 3"),
            ("reference.n_frames", 0, "reference.n_frames: "),
            ("reference.probes", "all", "reference.probes: "),
            ("reference.probes", 0, "reference.probes: expected full or at least 1"),
            ("reference.workers", -1, "reference.workers: expected auto or at least 1"),
            ("reference.n_samples", 30, r"reference: fewer HVP samples \(8\) than blocks \(10\)"),
            ("priors.bonds", "maybe", "priors.bonds: "),
            ("model.kind", "mace", "model.kind: .*'schnet'"),
            ("model.cutoff_nm", 0, "model.cutoff_nm: "),
            ("model.radial", 1, "model.radial: "),
            ("training.arms", [], "training: arms need at least one entry"),
            ("training.arms", [{"name": "a"}, {"name": "a"}], "distinct names, got"),
            ("training.arms", [{"hvp_weight": 1}], "training.arms.0.name: missing"),
            (
                "training.arms",
                [{"name": "a", "hvp_weight": -1}],
                "arm a: hvp_weight: expected balanced, or a number of at least 0",
            ),
            ("training.arms", [{"name": "a", "features": 0}], "arm a: features: "),
            ("training.arms", [{"name": "a", "arms": []}], "arm a: unknown key 'arms'"),
            ("training.arms", [{"name": "a", "force_weight": 0}], "arm a: .*both 0"),
            ("training.validation_fraction", 1, "training.validation_fraction: .*less than 1"),
            ("training.learning_rate", 0, "training.learning_rate: "),
            ("training.accelerator", "tpu", "training.accelerator: "),
            ("simulation.save_every", 200000, r"save_every \(200000\) is larger than n_steps \(100000\)"),
            ("simulation.backend", "gpu", "simulation.backend: "),
            ("simulation.trajectory_format", "pdb", "simulation.trajectory_format: "),
            ("analysis.burn_in", 0.95, "analysis.burn_in: "),
            ("analysis.blocks", 1, "analysis.blocks: "),
            ("analysis.features", "angles", "analysis.features: "),
        ],
    )
    def test_names_key_and_value(self, key: str, value: Any, message: str) -> None:
        assert re.search(message, explain(change(key, value)))

    def test_missing(self) -> None:
        assert "molecules: missing" in explain({})
        assert "molecules.0.input: missing" in explain({"molecules": [{"name": "a"}]})
        assert "molecules.0.name: missing" in explain({"molecules": [{"input": {"sequence": "A"}}]})

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ({}, "expected exactly one of sequence, prmtop, top, psf, system_xml, pdb, got none"),
            ({"sequence": "A", "pdb": "a.pdb"}, "got sequence, pdb"),
            ({"sequence": "A", "system_xml": "a.xml", "pdb": "a.pdb"}, "got sequence, system_xml"),
            ({"prmtop": "a", "coordinates": "b", "pdb": "c"}, "got prmtop, pdb"),
            ({"prmtop": "a"}, "prmtop and coordinates go together"),
            ({"sequence": "A", "coordinates": "a"}, "prmtop or top or psf and coordinates go together"),
            ({"top": "a"}, "top and coordinates go together"),
            ({"psf": "a", "coordinates": "b"}, "psf needs parameters"),
            ({"sequence": "A", "remove": ["HOH"]}, "pdb and remove go together"),
            ({"sequence": "A", "replace": ["SEP"]}, "pdb and replace go together"),
            ({"sequence": "A", "trajectory_stride": 2}, "trajectory and trajectory_stride go together"),
            ({"sequence": "A", "trajectory_choice": "cluster"}, "trajectory and trajectory_choice go together"),
            (
                {"sequence": "A", "trajectory": "a.dcd", "trajectory_choice": "cluster"},
                "cluster needs trajectory_frames",
            ),
            ({"psf": "a", "coordinates": "b", "parameters": ["c"], "box_nm": [1, 0, 1]}, "box_nm: expected edges"),
            ({"system_xml": "a.xml"}, "system_xml needs pdb"),
        ],
    )
    def test_source_of_a_molecule(self, source: dict[str, str], message: str) -> None:
        assert message in explain({"molecules": [{"name": "a", "input": source}]})

    def test_molecules_together(self) -> None:
        molecule = MINIMAL["molecules"][0]
        assert "molecules need distinct names" in explain({"molecules": [molecule, molecule]})
        assert "no molecule to train on" in explain({"molecules": [{**molecule, "role": "test"}]})

    def test_frames_chosen_by_cluster_are_not_compared_with(self) -> None:
        """Not where they are judged, nor where all are because there is no molecule to test on."""
        chosen = {"pdb": "a.pdb", "trajectory": "a.dcd", "trajectory_frames": 9, "trajectory_choice": "cluster"}
        for role, other in (("both", "test"), ("test", "train"), ("train", "train")):
            molecules = [
                {"name": "a", "role": role, "input": chosen},
                {"name": "b", "role": other, "input": {"pdb": "b"}},
            ]
            assert "molecule a is compared with, and frames chosen by cluster" in explain({"molecules": molecules})
        molecules = [
            {"name": "a", "role": "train", "input": chosen},
            {"name": "b", "role": "test", "input": {**chosen, "trajectory_choice": "time"}},
        ]
        validate_protocol({"molecules": molecules})
        dense = {"arms": [{"name": "fm"}, {"name": "dense", "density": 0.5}]}
        assert "arm dense learns from the density of the frames" in explain({"molecules": molecules, "training": dense})

    def test_frames_sampled_with_a_bias_are_not_compared_with(self) -> None:
        """There has to be a molecule that gets the bias, and one that does not, to compare with."""
        sequence, trajectory = {"sequence": "A"}, {"pdb": "a.pdb", "trajectory": "a.dcd"}

        def ask(*molecules: tuple[str, dict[str, str]], **more: Any) -> dict[str, Any]:
            named = zip("ab", molecules, strict=False)
            listed = [{"name": name, "role": role, "input": source} for name, (role, source) in named]
            return {"molecules": listed, "sampling": {"flatten": 0.5, **more.pop("sampling", {})}, **more}

        good = ("train", sequence), ("test", sequence)
        protocol = validate_protocol(ask(*good))
        assert [protocol.is_flattened(m) for m in protocol.molecules] == [True, False]
        none = "sampling.flatten acts on molecules that are sampled and only trained on, and there is none"
        assert none in explain(ask(("both", sequence)))
        assert none in explain(ask(("train", trajectory), ("test", sequence)))
        assert "molecule a is compared with, and frames sampled with a bias" in explain(ask(("train", sequence)))
        dense = {"arms": [{"name": "fm"}, {"name": "dense", "density": 0.5}]}
        assert "arm dense learns from the density" in explain(ask(*good, training=dense))
        few = {"walkers": 30, "flatten_frames": 20}
        assert "fewer frames without the bias (flatten_frames, 20) than walkers (30)" in explain(
            ask(*good, sampling=few)
        )

    def test_density_of_an_arm(self) -> None:
        training: dict[str, Any] = {"arms": [{"name": "dense", "density": 0.9}]}
        assert resolve_arm(validate_protocol({**MINIMAL, "training": training}), "dense")[0].density == 0.9
        training["whiten"] = "noise"
        along = {"arms": [{"name": "bonds", "hvp_along": "bonds", "whiten": "noise"}]}
        assert "hvp_along: bonds and whiten: noise exclude each other" in explain({**MINIMAL, "training": along})
        assert "density and whiten: noise exclude each other" in explain({**MINIMAL, "training": training})
        # Without any forces nothing would hold the network along bonds.
        assert "training.density" in explain({**MINIMAL, "training": {"density": 1.0}})

    def test_friendly_forms(self) -> None:
        # YAML 1.1 takes 1e-3 for text: a number in text is meant as a number.
        protocol = validate_protocol(change("training.learning_rate", "1e-3"))
        assert protocol.training.learning_rate == 1e-3
        assert validate_protocol(change("labels.step_nm", "1e-4")).labels.step_nm == 1e-4
        assert validate_protocol(change("labels.workers", 3)).labels.workers == 3
        protocol = validate_protocol({"molecules": [{"name": "a", "input": {"pdb": "a", "trajectory": "x.dcd"}}]})
        assert protocol.molecules[0].input.trajectory == ["x.dcd"]

    def test_cannot_change_afterwards(self) -> None:
        protocol = validate_protocol(MINIMAL)
        with pytest.raises(ValidationError):
            protocol.sampling.n_frames = 1  # type: ignore[misc]


class TestReference:
    """The section is off unless it is given."""

    def test_an_empty_section_turns_it_on(self) -> None:
        assert validate_protocol(MINIMAL).reference is None
        assert validate_protocol({**MINIMAL, "reference": {}}).reference == config.ReferenceSettings()

    def test_an_override_turns_it_on(self, tmp_path: Path) -> None:
        protocol = load(tmp_path, config.dump_protocol(validate_protocol(MINIMAL)), "reference.n_frames=3")
        assert protocol.reference == config.ReferenceSettings(n_frames=3)
        assert load(tmp_path, config.dump_protocol(protocol)) == protocol

    @pytest.mark.parametrize(
        ("name", "section"), [("reference", config.ReferenceSettings), ("averaging", config.AveragingSettings)]
    )
    def test_keys_are_described_so_that_uncommenting_turns_it_on(self, name: str, section: type[BaseModel]) -> None:
        lines = [line.removeprefix("  ") for line in config.describe_defaults().splitlines()]
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: null"))
        keys = itertools.takewhile(lambda line: line.startswith("# "), lines[start + 1 :])
        text = "\n".join([f"{name}:", *(f" {line[1:]}" for line in keys)])
        assert yaml.safe_load(text)[name] == section().model_dump()


class TestFile:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("molecules: [", "not YAML"),
            ("a: b: c", "not YAML"),
            ("\tx: 1", "not YAML"),
            ("x: 2020-13-45", "not YAML"),
            ("x: !!python/object/apply:os.getcwd []", "not YAML"),
            ("[" * 3000, "not YAML"),
            ("model: {features: 8}\nmodel: {features: 9}", "key 'model' is given twice"),
            ("model: {features: 8, features: 9}", "key 'features' is given twice"),
            ("", "not a protocol: expected sections with keys, got NoneType"),
            ("- a", "not a protocol: .* got list"),
            ("hello", "not a protocol: .* got str"),
        ],
    )
    def test_not_a_protocol(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=rf"p\.yaml: .*{message}") as caught:
            load(tmp_path, text)
        assert "\n" not in str(caught.value)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such protocol file"):
            load_protocol(tmp_path / "none.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_protocol(tmp_path)
        (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_protocol(tmp_path / "p.yaml")

    def test_error_names_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"p\.yaml: model\.features: "):
            load(tmp_path, CONTRACT, "model.features=x")
        with pytest.raises(ConfigError, match=r"p\.yaml: arm fm: unknown key"):
            load(tmp_path, CONTRACT, "training.arms.0.zzz=1")

    def test_dump_and_validate_again(self, tmp_path: Path) -> None:
        first = load(tmp_path, CONTRACT)
        text = config.dump_protocol(first)
        assert load(tmp_path, text) == first
        assert config.dump_protocol(load(tmp_path, text)) == text


class TestOverrides:
    def test_values_are_yaml(self, tmp_path: Path) -> None:
        protocol = load(
            tmp_path,
            CONTRACT,
            "sampling.n_frames=12",
            "training.learning_rate=5e-4",
            "priors.repulsion=false",
            "mapping.beads=name CA or name CB",
            "molecules.0.input.sequence=AA",
            "molecules.4.input.trajectory=[x.dcd]",
            "training.arms.1.hvp_weight=0.5",
            "training.arms.1.features=16",
            "labels={probes_per_frame: 7}",
            "temperature_K=310",
            "molecules.0.native_pdb=a=b.pdb",
        )
        assert protocol.sampling.n_frames == 12
        assert protocol.sampling.stride == 250
        assert protocol.training.learning_rate == 5e-4
        assert protocol.priors.repulsion is False
        assert protocol.mapping.beads == "name CA or name CB"
        assert protocol.molecules[0].input.sequence == "AA"
        assert protocol.molecules[4].input.trajectory == ["x.dcd"]
        assert resolve_arm(protocol, "hvp")[0].hvp_weight == 0.5
        assert resolve_arm(protocol, "hvp")[1].features == 16
        assert protocol.labels.probes_per_frame == 7
        assert protocol.temperature_K == 310
        assert protocol.molecules[0].native_pdb == "a=b.pdb"

    def test_opens_sections_that_are_not_there(self, tmp_path: Path) -> None:
        text = yaml.safe_dump({**MINIMAL, "analysis": None})
        protocol = load(tmp_path, text, "sampling.n_frames=12", "analysis.bins=9")
        assert (protocol.sampling.n_frames, protocol.analysis.bins) == (12, 9)

    def test_last_one_wins(self, tmp_path: Path) -> None:
        assert load(tmp_path, CONTRACT, "model.radial=5", "model.radial=6").model.radial == 6

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("sampling.n_frames", "cannot read --set: expected section.key=value, got sampling.n_frames"),
            ("=3", "cannot read --set"),
            ("", "cannot read --set"),
            ("sampling.n_frames=[", "--set sampling.n_frames: not YAML"),
            ("molecules.5.name=x", "--set molecules.5.name: there is no '5' to set"),
            ("molecules.-1.name=x", "there is no '-1' to set"),
            ("molecules.first.name=x", "there is no 'first' to set"),
            ("training.arms.2={name: x}", "there is no '2' to set"),
            ("temperature_K.value=3", "there is no 'value' to set"),
            ("temperature_K.value.x=3", "there is no 'value' to set"),
            ("sampling.n_frames=many", "sampling.n_frames: "),
            ("smapling.n_frames=3", "unknown key 'smapling'; did you mean 'sampling'"),
            ("sampling..n_frames=3", "unknown key"),
        ],
    )
    def test_bad(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, CONTRACT, override)
        assert message in str(caught.value)


class TestArms:
    def test_without_overrides_is_the_section(self) -> None:
        protocol = validate_protocol(change("training.arms", [{"name": "fm"}]))
        training, model = resolve_arm(protocol, "fm")
        assert model == protocol.model
        assert training.model_dump(exclude={"arms"}) == protocol.training.model_dump(exclude={"arms"})

    def test_overrides_training_and_model_of_its_own(self) -> None:
        content = change("training.hvp_weight", 0.25)
        content["training"]["arms"] = [{"name": "a"}, {"name": "b", "max_epochs": 3, "cutoff_nm": 0.9, "hvp_weight": 2}]
        protocol = validate_protocol(content)
        (a, model_a), (b, model_b) = resolve_arm(protocol, "a"), resolve_arm(protocol, "b")
        assert (a.hvp_weight, a.max_epochs, model_a.cutoff_nm) == (0.25, 200, 1.2)
        assert (b.hvp_weight, b.max_epochs, model_b.cutoff_nm) == (2.0, 3, 0.9)
        assert [arm.name for arm in b.arms] == ["b"]

    def test_no_such_arm(self) -> None:
        with pytest.raises(ConfigError, match=r"no such arm: expected \['fm', 'hvp'\], got mf"):
            resolve_arm(validate_protocol(MINIMAL), "mf")

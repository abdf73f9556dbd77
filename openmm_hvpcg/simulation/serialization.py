"""Systems as OpenMM XML, TorchForce included.

What is written is plain ``openmm.XmlSerializer`` output. Reading it back with ``openmm.XmlSerializer``
crashes the process when a TorchForce is in it: openmmtorch 1.5 was built against an OpenMM whose
``SerializationNode::getStringProperty`` returns a reference, OpenMM 8.6.1 returns it by value (with 8.5.2 it
works). So the TorchForce nodes are read here, from the TorchScript that the XML holds in hexadecimal, and
OpenMM reads the rest. ``copy.deepcopy`` of such a System crashes for the same reason; use
:func:`serialize_system` and :func:`deserialize_system`.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import openmm

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.simulation.backends import NETWORK_NAME, import_openmmtorch, load_script
from openmm_hvpcg.storage import PathLike, write_text


def serialize_system(system: openmm.System) -> str:
    """A System as OpenMM XML text."""
    return openmm.XmlSerializer.serialize(system)


def deserialize_system(text: str, where: object = None) -> openmm.System:
    """Inverse of :func:`serialize_system`: the same forces in the same order, with groups and names.

    A PythonForce travels as a Python pickle, as OpenMM defines it: read only XML you trust.

    Raises
    ------
    InputError
        Not the XML of a System.
    BackendError
        It holds a TorchForce and openmmtorch cannot load.
    """
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"not XML ({error})", where=where) from error
    nodes = root.find("Forces")
    if root.tag != "System" or nodes is None:
        raise InputError("not a serialized OpenMM System", expected="<System>", got=f"<{root.tag}>", where=where)
    forces = list(nodes)
    for node in forces:
        nodes.remove(node)
    try:
        system = openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))
        for node in forces:
            system.addForce(_read_force(node))
    except (openmm.OpenMMException, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"the System is damaged ({str(error).splitlines()[0]})", where=where) from error
    return system


def save_system(system: openmm.System, path: PathLike) -> None:
    """Write a System as OpenMM XML, whole or not at all."""
    write_text(path, serialize_system(system))


def load_system(path: PathLike) -> openmm.System:
    """Read a System written by :func:`save_system` or any OpenMM tool; see :func:`deserialize_system`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=path) from error
    return deserialize_system(text, where=path)


def _read_force(node: ET.Element) -> openmm.Force:
    if node.get("type") != "TorchForce":
        return openmm.XmlSerializer.deserialize(ET.tostring(node, encoding="unicode"))
    content = bytes.fromhex(node.attrib["encodedFileContents"])
    force = import_openmmtorch().TorchForce(load_script(content))
    # openmmtorch does not write the name; ours has one.
    force.setName(node.get("name", NETWORK_NAME))
    force.setForceGroup(int(node.attrib["forceGroup"]))
    force.setUsesPeriodicBoundaryConditions(node.attrib["usesPeriodic"] == "1")
    force.setOutputsForces(node.attrib["outputsForces"] == "1")
    for parameter in node.iterfind("GlobalParameters/Parameter"):
        force.addGlobalParameter(parameter.attrib["name"], float(parameter.attrib["default"]))
    for derivative in node.iterfind("ParameterDerivatives/Parameter"):
        force.addEnergyParameterDerivative(derivative.attrib["name"])
    for entry in node.iterfind("Properties/Property"):
        force.setProperty(entry.attrib["name"], entry.attrib["value"])
    return force

"""Each protein judged on a potential trained on all the others; sampled and labelled once for all.

    python protocols/fast_folders/leave_one_out.py --out runs/fast_folders

OUT/data is a study of frames and labels of all molecules of the protocol, whatever their roles there. OUT/<molecule>
is a study of its own, trained on the others, with a report; OUT/leave_one_out.json has the figures of all that are
finished. The command goes on where it was stopped. `--set` is that of openmm-hvpcg; `--molecules` takes a part.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openmm_hvpcg.errors import HVPCGError
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.study.folder import CONFIG_NAME, RECORDS, Study, open_study
from openmm_hvpcg.study.stages import run_stage, run_study

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("leave_one_out")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--molecules", nargs="+", help="judge these only; all are trained on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        leave_each_out(options.protocol, options.out, options.overrides, options.molecules)
    except HVPCGError as error:
        sys.exit(f"error: {error}")


def leave_each_out(protocol: Path, out: Path, overrides: Sequence[str], wanted: Sequence[str] | None) -> None:
    names = [m.name for m in open_study(protocol, out / "data", overrides).protocol.molecules]
    unknown = sorted(set(wanted or ()) - set(names))
    if unknown:
        sys.exit(f"error: no molecule {', '.join(unknown)} in {protocol}; there are {', '.join(names)}")
    data = open_study(protocol, out / "data", [*overrides, *set_roles(names, None)])
    run_stage(data, "sample")
    run_stage(data, "label")
    results = out / "leave_one_out.json"
    figures: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    for name in wanted or names:
        logger.info("%s held out", name)
        share_data(data, out / name)
        study = open_study(protocol, out / name, [*overrides, *set_roles(names, name)])
        # Molecules that are built already: large ones take minutes.
        study = replace(study, cache=data.cache)
        figures[name] = run_study(study)["molecules"][name]
        write_json(results, figures)
    for name, molecule in figures.items():
        kl = (f"{arm} {describe_kl(found)}" for arm, found in molecule["arms"].items())
        logger.info("%s: KL along the slowest mode: %s", name, ", ".join(kl))


def set_roles(names: Sequence[str], held_out: str | None) -> list[str]:
    """Overrides that train on all molecules but one."""
    return [f"molecules.{k}.role={'test' if name == held_out else 'train'}" for k, name in enumerate(names)]


def describe_kl(figures: dict[str, Any]) -> str:
    """The divergence of one arm with its error, or what became of its run."""
    kl, error = figures.get("kl_tica1"), figures.get("kl_tica1_error")
    return f"none ({figures['status']})" if kl is None else f"{kl:.2f} ± {error:.2f}"


def share_data(data: Study, folder: Path) -> None:
    """Begin a study on the frames and labels of another: links to them, and the records that they are done."""
    if (folder / CONFIG_NAME).exists():
        return
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    for path in (data.frames_path(""), data.dataset_path(""), data.map_path("")):
        link = folder / path.parent.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(path.parent, folder), target_is_directory=True)
    for stage in ("sample", "label"):
        for record in (data.out / RECORDS).glob(f"{stage}.*.json"):
            shutil.copy(record, folder / RECORDS)
    # Last: it is what makes the folder a study.
    shutil.copy(data.out / CONFIG_NAME, folder)


if __name__ == "__main__":
    main()

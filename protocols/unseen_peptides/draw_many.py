"""Draw the training peptides of many.yaml: 140 more beside the 24 of protocol.yaml, judged on the same nine.

    python protocols/unseen_peptides/draw_many.py > protocols/unseen_peptides/many.yaml

At random, but no residue twice in a peptide, no three residues in a row of a peptide to test on, and of several
candidates the one whose pairs of neighbours are the rarest so far, so that nearly all pairs occur.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from openmm_hvpcg.config import load_protocol

HERE = Path(__file__).resolve().parent
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
#: Peptides of each length: the longer ones hold more neighbours and contacts, and cost more.
LENGTHS = {3: 36, 4: 50, 5: 60, 6: 70}
CANDIDATES = 20
SEED = 5
#: Of those drawn so many are taken, the first ones: what two cores sample and label in an hour and a half.
TAKEN = {3: 12, 4: 24, 5: 34, 6: 70}
#: Of each; and epochs that make as many steps as protocol.yaml has.
FRAMES, EPOCHS = 160, 29


def draw(known: list[str], unseen: list[str]) -> list[str]:
    rng = np.random.default_rng(SEED)
    forbidden = {s[i : i + 3] for s in unseen for i in range(len(s) - 2)}
    pairs = Counter(s[i : i + 2] for s in known for i in range(len(s) - 1))
    drawn: list[str] = []
    for length, number in LENGTHS.items():
        for _ in range(number):
            candidates: list[str] = []
            while len(candidates) < CANDIDATES:
                s = "".join(rng.choice(list(RESIDUES), length, replace=False))
                if s not in [*known, *drawn] and not any(s[i : i + 3] in forbidden for i in range(length - 2)):
                    candidates.append(s)
            best = min(candidates, key=lambda s: sum(pairs[s[i : i + 2]] for i in range(len(s) - 1)))
            pairs.update(best[i : i + 2] for i in range(length - 1))
            drawn.append(best)
    return [s for n in LENGTHS for s in [d for d in drawn if len(d) == n][: TAKEN[n]]]


def main() -> None:
    protocol = load_protocol(HERE / "protocol.yaml")
    names = {role: [m.name for m in protocol.molecules if m.role == role] for role in ("train", "test")}
    drawn = draw(names["train"], names["test"])
    lines = (HERE / "protocol.yaml").read_text(encoding="utf-8").splitlines()
    first = next(k for k, line in enumerate(lines) if "role: test" in line)
    more = [f"  - {{name: {s}, role: train, input: {{sequence: {s}, hydrogen_mass_amu: 3}}}}" for s in drawn]
    head = [
        f"# protocol.yaml with {len(drawn)} more training peptides, and {FRAMES} frames of each.",
        "# Made by draw_many.py; see README.md for how the frames are sampled on two cores.",
    ]
    body = [*lines[:first], *more, *lines[first:]]
    body = body[next(k for k, line in enumerate(body) if not line.startswith("#")) :]
    text = "\n".join([*head, *body]) + "\n"
    text = text.replace("max_frames: 1600", f"max_frames: {FRAMES}").replace("max_epochs: 20", f"max_epochs: {EPOCHS}")
    for line in text.splitlines(keepends=True):
        # Frames that are no equilibrium ensemble have no density to learn from.
        if "density: " not in line:
            sys.stdout.write(line)


if __name__ == "__main__":
    main()

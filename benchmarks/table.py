"""The tables of measurements in README.md and docs/, and a picture, from benchmarks/results/*.json.

    python benchmarks/table.py [--write]

Replaces what stands between a pair of markers, <!-- measured --> and <!-- /measured -->, say.
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


def summary() -> str:
    """The figures that README.md begins with."""
    (_, (row, *_)), (_, exact) = rows("select"), rows("exact")
    s, wrong = row["seconds"], {r["dtype"]: r["plain PyTorch decides otherwise"] for r in exact}
    files = json.loads((RESULTS / "stream_bfloat16_12GB.json").read_text())
    times = files["seconds"]
    lines = [
        "| | dimap | plain PyTorch |",
        "|---|---|---|",
        f"| masks for the {row['weights'] / 1e6:.1f} million weights of a Swin-B | {s['select'] * 1e3:.0f} ms, "
        f"**{s['plain PyTorch'] / s['select']:.0f} times as fast** | {s['plain PyTorch']:.1f} s |",
        f"| wrong decisions among them, by exact arithmetic | **0** | {wrong['float32']:,} of float32, "
        f"{wrong['bfloat16']:,} of bfloat16 |",
        f"| a checkpoint of {files['gigabytes']:.0f} GB, from file to file | {times['dimap']:.0f} s in "
        f"{files['memory_above_import_mb']:.0f} MB of memory (`cp` and `sync`: {times['cp and sync']:.0f} s) | |",
    ]
    return "\n".join(lines)


def draw_speed(path: Path) -> None:
    """The picture that README.md begins with: select beside what else there is, to scale."""
    from dimap.plots import style
    from matplotlib.figure import Figure

    machine, (row, *_) = rows("select")
    seconds = row["seconds"]
    bars = {  # the job, its name, colour
        "copy": ("a copy of the weights", style.GREY),
        "select": ("dimap.select", style.BLUE),
        "global_unstructured": ("torch.nn.utils.prune\n(global_unstructured, by magnitude)", style.ORANGE),
        "plain PyTorch": ("the same rule in plain PyTorch\n(sort, cumsum, scatter, topk)", style.ORANGE),
    }  # fmt: skip
    with style.looking():
        figure = Figure(figsize=(style.WIDTH, 2.3))
        axes = figure.subplots()
        for place, (job, (_, color)) in enumerate(bars.items()):
            time = seconds[job]
            axes.barh(place, time, height=0.6, color=color)
            words = f"{time:.1f} s" if time > 1 else f"{time * 1e3:.0f} ms"
            beside = (
                ""
                if job in ("copy", "select")
                else f", {time / seconds['select']:.0f} times as long"
            )
            axes.text(time, place, f"  {words}{beside}", va="center")
        axes.set_yticks(range(len(bars)), [name for name, _ in bars.values()])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(seconds.values()))
        axes.set_xlabel("seconds")
        axes.set_title(
            f"Masks for a Swin-B, {row['weights'] / 1e6:.1f} M weights, {row['dtype']}: "
            f"{machine['cpu']}, {machine['threads']} threads",
            loc="left",
        )
        style.finish(figure, path)


def gpu_table() -> str:
    """select and score on a GPU, or that nobody has measured them yet."""
    if not (RESULTS / "gpu.json").exists():
        return "**No GPU results yet**: the CUDA library is compiled, its PTX tested on an emulator, not yet run on a GPU ([docs/cuda.md](docs/cuda.md))."
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


def files_table() -> str:
    """Checkpoints pruned from file to file, beside cp."""
    lines = [
        "| checkpoint | `cp -r` | `cp -r`, `sync` | dimap | beside `cp -r` | beside `cp -r`, `sync` | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("bfloat16_12GB", "bfloat16_1.2GB", "float32_1.2GB"):
        result = json.loads((RESULTS / f"stream_{name}.json").read_text())
        seconds = result["seconds"]
        times = " | ".join(f"{seconds[job]:.2f} s" for job in ("cp", "cp and sync", "dimap"))
        lines.append(
            f"| {result['gigabytes']:g} GB {result['dtype']}, {result['shards']} shards | {times} "
            f"| {result['ratio_to_cp']:.1f} × | {result['ratio_to_cp_and_sync']:.1f} × "
            f"| {result['memory_above_import_mb']:.0f} MB |"
        )
    return "\n".join([*lines, "", f"{about(result['machine'])}."])


def commands_table() -> str:
    """Commands from their start to their end, beside `import torch`."""
    result = json.loads((RESULTS / "commands.json").read_text())
    what = {
        "import torch": '`python -c "import torch"`',
        "dimap --help": "`dimap --help`",
        "dimap inspect": f"`dimap inspect` of a Swin-T, {result['megabytes']:.0f} MB",
        "dimap prune": "`dimap prune` of it",
    }
    lines = ["| command | seconds | beside `import torch` |", "|---|---|---|"]
    for name, seconds in result["seconds"].items():
        beside = result["beside_import_torch"][name]
        lines.append(f"| {what[name]} | {seconds:.2f} | {beside:.2f} × |")
    return "\n".join([*lines, "", f"{about(result['machine'])}."])


def csr_table() -> str:
    """torch's sparse product beside the dense one."""
    machine, measured = rows("csr")
    lines = [
        "| zeros | " + " | ".join(f"{100 * row['sparsity']:.0f} %" for row in measured) + " |",
        "|---|" + "---|" * len(measured),
        "| time beside dense | "
        + " | ".join(f"{row['beside dense']:.2f} ×" for row in measured)
        + " |",
    ]
    return "\n".join([*lines, "", f"{machine['cpu']}, one thread, torch {machine['torch']}."])


def sizes_table() -> str:
    """Files of trained weights at 55 %, as shares of the dense ones."""
    sizes = json.loads((RESULTS / "compact.json").read_text())["sizes"]
    names = [name for name in sizes[0]["ratio"] if name != "dense"]
    lines = [
        "| checkpoint | of it pruned | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for row in sizes:
        cells = " | ".join(f"{100 * row['ratio'][name]:.1f} %" for name in names)
        lines.append(
            f"| {row['model']} {row['dtype']} | {100 * row['weights_that_are_pruned']:.0f} % | {cells} |"
        )
    return "\n".join(lines)


def compact_table() -> str:
    """Dense bytes a second of the coder, and the commands beside each other."""
    result = json.loads((RESULTS / "compact.json").read_text())
    jobs = {
        "prune_to_bitmask": "`--format bitmask`",
        "prune_to_compact": "`--format compact`",
        "expand": "`dimap expand` of bitmask",
        "expand_compact": "of compact",
    }
    lines = [
        "| Swin-B at 55 % | compress | decompress | " + " | ".join(jobs.values()) + " |",
        "|---" * (3 + len(jobs)) + "|",
    ]
    for name, coder in result["coder"].items():
        seconds = result["disk"][name]
        cells = [f"{coder[f'{x}_gb_per_s_of_a_core']:.1f} GB/s" for x in ("compress", "decompress")]
        cells += [f"{seconds[f'{x}_seconds'] / seconds['prune_seconds']:.1f} ×" for x in jobs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        "the coder in dense bytes a second of one core's time, from memory to memory; commands from file to "
        "file, beside `dimap prune` to a dense file"
    )
    return "\n".join([*lines, "", f"{about(result['machine'])}: {note}."])


def about(machine: dict) -> str:
    cpu, cores, load = machine["cpu"], machine["cores"], machine["load_before"]
    return f"{cpu}, {cores} cores, load {load:.1f} before, commit {machine['commit']}"


ROOT = RESULTS.parent.parent
TABLES = {  # file -> marker -> what makes the table
    "README.md": {"summary": summary, "measured": table, "measured on a GPU": gpu_table},
    "docs/questions.md": {"csr": csr_table},
    "docs/streaming.md": {"measured": files_table},
    "docs/performance.md": {"commands": commands_table},
    "docs/format.md": {"sizes": sizes_table, "compact": compact_table},
}


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
    parser.add_argument("--write", action="store_true", help="into the files")
    args = parser.parse_args()
    for name, tables in TABLES.items():
        path = ROOT / name
        text = path.read_text()
        for marker, make in tables.items():
            new = make()
            text = replace(text, marker, new, path)
            if not args.write:
                print(new, end="\n\n")
        if args.write:
            path.write_text(text)
    if args.write:
        draw_speed(ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()

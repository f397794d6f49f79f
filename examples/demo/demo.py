"""Prune a trained Swin through the real command line and see what it costs in accuracy.

    python examples/demo/demo.py [--sparsity 0.55] [--out demo-out] [--jobs N]

Compares three rules at the same number of weights, one shot, without fine-tuning:
DIMAP (one threshold per module), uniform magnitude (the same ratio in every layer) and
LAMP (one threshold for the network). README.md says how the model was trained.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dimap
import model as demo
import torch
from dimap.pruning import Scope
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

RULES: dict[str, Scope] = {"DIMAP": "module", "uniform": "layer", "LAMP": "global"}
RATIOS = (0.35, 0.55, 0.75, 0.85)
console = Console(highlight=False)


def say(text: str = "") -> None:
    console.print(f"   {text}", soft_wrap=True)


def step(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}.[/] [bold]{text}[/]", soft_wrap=True)


def shown(path: Path) -> str:
    """A path as the reader would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def prune_file(sparsity: float, rule: str, out: Path) -> tuple[Path, list[str]]:
    """The file that pruning the checkpoint by `rule` gives, and the command that writes it."""
    target = out / f"swin_{rule.lower()}.safetensors"
    files = [shown(demo.CHECKPOINT), shown(target)]
    options = ["--sparsity", str(sparsity), "--scope", RULES[rule], "--force"]
    if rule == "DIMAP":
        options += ["--report", shown(out / "report.json")]
    command = ["prune", *files, *options]
    say(f"[dim]$[/] dimap {shlex.join(command)}")
    return target, [sys.executable, "-m", "dimap", *command]


def run(commands: Sequence[list[str]], quiet: bool) -> None:
    """Run commands side by side; a quiet one is heard only if it fails."""
    pipe = subprocess.PIPE if quiet else None
    running = [subprocess.Popen(c, stdout=pipe, stderr=pipe, text=True) for c in commands]
    for process in running:
        output = process.communicate()
        if process.returncode:
            sys.stderr.write("".join(text for text in output if text))
            raise SystemExit(f"dimap prune must exit with 0, got {process.returncode}")


class Judge:
    """Says which images of the held-out sample a model gets right."""

    def __init__(self, jobs: int) -> None:
        self.images, self.labels = demo.load_sample()
        self.jobs = jobs
        # One thread a model, several models at once: threads that share a model's small layers
        # wait for each other, many times as long on a busy machine.
        torch.set_num_threads(1)

    def __call__(self, nets: Sequence[nn.Module]) -> list[Tensor]:
        """One bool tensor [images] per model."""
        with ThreadPoolExecutor(self.jobs) as pool:
            predictions = pool.map(lambda net: demo.predict(net, self.images), nets)
            return [predicted == self.labels for predicted in predictions]


def difference(hits: Tensor, other: Tensor) -> tuple[float, float]:
    """Accuracy less the other's over the same images, and its standard error, in points."""
    paired = 100 * (hits.double() - other.double())
    return paired.mean().item(), paired.std().item() / len(paired) ** 0.5


def table(rows: dict[float, list[Tensor]]) -> Table:
    """One row per ratio: accuracy under each rule, best in bold, and what DIMAP gains or loses."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    others = [f"DIMAP less {rule}" for rule in list(RULES)[1:]]
    for column in ("removed", *RULES, *others):
        result.add_column(column, justify="right", no_wrap=True)
    for ratio, hits in rows.items():
        best = max(int(h.sum()) for h in hits)
        cells = [f"{100 * h.double().mean():.1f} %" for h in hits]
        marked = [
            f"[bold]{cell}[/]" if int(h.sum()) == best else cell
            for cell, h in zip(cells, hits, strict=True)
        ]
        gains = ["{:+.1f} ± {:.1f}".format(*difference(hits[0], other)) for other in hits[1:]]
        result.add_row(percent(ratio), *marked, *gains)
    return result


def verdict(hits: list[Tensor]) -> str:
    """DIMAP against the others in words: a difference within two standard errors is none."""
    words = []
    for rule, other in zip(list(RULES)[1:], hits[1:], strict=True):
        gain, error = difference(hits[0], other)
        word = "better than" if gain > 0 else "worse than"
        words.append(f"{word if abs(gain) > 2 * error else 'level with'} {rule}")
    return " and ".join(words)


def prune_copy(net: nn.Module, sparsity: float, rule: str) -> nn.Module:
    pruned = copy.deepcopy(net)
    dimap.prune(pruned, sparsity, scope=RULES[rule])
    return pruned


def same_weights(net: nn.Module, other: nn.Module) -> bool:
    right = other.state_dict()
    return all(torch.equal(tensor, right[name]) for name, tensor in net.state_dict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.55)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where files go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models at a time")
    args = parser.parse_args()
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    out, here = args.out.resolve(), percent(args.sparsity)

    step(1, "The dense model")
    judge = Judge(args.jobs)
    net = demo.load_model()
    [dense] = judge([net])
    trained = demo.read_metadata()
    size = sum(p.numel() for p in net.parameters())
    say(f"A Swin of {size:,} parameters, trained {trained['epochs']} epochs on Fashion-MNIST:")
    say(f"{trained['test_accuracy']} % of the 10,000 test images,")
    say(f"{100 * dense.double().mean():.1f} % of the {len(dense):,} of them that are shipped here.")

    step(2, f"DIMAP through the command line: {here} of the weights of each module")
    dimap_file, command = prune_file(args.sparsity, "DIMAP", out)
    run([command], quiet=False)

    step(3, "As many weights by uniform magnitude (the same ratio in every layer) and by LAMP")
    others, commands = zip(
        *(prune_file(args.sparsity, rule, out) for rule in list(RULES)[1:]), strict=True
    )
    run(commands, quiet=True)

    step(4, "What it costs, without any fine-tuning")
    pruned = [copy.deepcopy(net) for _ in RULES]
    for each, path in zip(pruned, (dimap_file, *others), strict=True):
        each.load_state_dict(load_file(path))
    rows = {args.sparsity: judge(pruned)}
    hits = rows[args.sparsity]
    say(f"dense {100 * dense.double().mean():.1f} % of the sample; pruned:")
    console.print(table(rows))
    say(f"At {here} DIMAP is {verdict(hits)}.")
    say("± is one standard error over the same images; within two of them we say level.")

    step(5, "The same in Python, at other ratios: dimap.prune(model, ratio, scope=…)")
    for rule, from_file in zip(RULES, pruned, strict=True):
        if not same_weights(prune_copy(net, args.sparsity, rule), from_file):
            raise SystemExit(f"{rule}: Python and the command line must agree, they differ")
    say(f"At {here} Python zeroes exactly the weights that the command line zeroed.")
    ratios = [ratio for ratio in RATIOS if ratio not in rows]
    judged = iter(judge([prune_copy(net, ratio, rule) for ratio in ratios for rule in RULES]))
    rows |= {ratio: [next(judged) for _ in RULES] for ratio in ratios}
    console.print(table(dict(sorted(rows.items()))))
    say("All of this is one shot; fine-tuning with the masks held: docs/guide.md.")
    say(f"\n   Files are in {shown(out)}/; all this took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()

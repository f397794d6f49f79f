"""What held masks cost: a training step of a Swin with and without them.

    python benchmarks/bench_holding.py [--model swin_tiny_patch4_window7_224] [--batch 8]
                                       [--threads 2] [--repeats 9] [--save]

A step is forward, backward and AdamW in float32 on random images, 55 % of the weights pruned. Steps
with and without masks alternate; because their difference is of the size of the noise of a busy
machine, the hooks are timed alone as well, and `share` is their time over that of a free step.
Beside them: the same masks by torch.nn.utils.prune, which multiplies in every forward pass.
--save writes benchmarks/results/holding.json. Runs on a GPU where torch has one.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import dimap
import harness
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

SPARSITY = 0.55


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Any:
    """A function that makes one step, and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=1e-8)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step, optimizer


def measure(name: str, batch: int, repeats: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).train()
    masks = dimap.prune(model, SPARSITY).masks
    images = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device)
    labels = torch.randint(1000, (batch,), device=device)
    wrapped = copy.deepcopy(model)
    for parameter, mask in masks.items():
        path, _, leaf = parameter.rpartition(".")
        torch_prune.custom_from_mask(wrapped.get_submodule(path), leaf, mask)

    step, optimizer = stepper(model, images, labels)
    step_wrapped, _ = stepper(wrapped, images, labels)
    holding = dimap.hold_masks(model, masks, optimizer)
    holding.remove()

    def hooks() -> None:
        holding.zero_gradients()
        holding.zero_weights()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def held() -> None:
        nonlocal holding
        holding = dimap.hold_masks(model, masks, optimizer)

    jobs = {"step": step, "step held": step, "step wrapped": step_wrapped, "hooks": hooks}
    prepare = {"step": lambda: holding.remove(), "step held": held}
    seconds = harness.time_in_turns(jobs, repeats, prepare)
    return {
        "model": name,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "masked_weights": sum(m.numel() for m in masks.values()),
        "seconds": seconds,
        "share": seconds["hooks"] / seconds["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/holding.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": harness.machine(), "rows": []}
    row = measure(args.model, args.batch, args.repeats)
    result["rows"].append(row)
    for job, seconds in row["seconds"].items():
        print(f"{job:14}{1e3 * seconds:10.1f} ms {100 * seconds / row['seconds']['step']:8.2f} %")
    if args.save:
        harness.save("holding", result)


if __name__ == "__main__":
    main()

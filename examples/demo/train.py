"""Train the demo's Swin on Fashion-MNIST and write the two files that the demo ships.

    python examples/demo/train.py --data DIR [--epochs 25] [--minutes 34] [--compile]

DIR holds the four idx files of Fashion-MNIST, plain or .gz. Nothing is downloaded; README.md says
where the files come from. The weights written are the moving average at the last step: no state is
picked by its test accuracy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import model as demo
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH, LR, WEIGHT_DECAY, WARMUP = 128, 2e-3, 0.05, 0.05
SMOOTHING, DROP_PATH, SHIFT, EMA = 0.1, 0.05, 2, 0.999
PER_CLASS = 100  # of the sample


def read_idx(folder: Path, stem: str) -> Tensor:
    """One idx file of unsigned bytes -> uint8 tensor of the shape in its header."""
    found = [p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
    if not found:
        raise FileNotFoundError(f"--data must hold {stem} or {stem}.gz, {folder} has neither")
    data = gzip.decompress(found[0].read_bytes()) if found[0].suffix else found[0].read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{found[0]} must be an idx file of unsigned bytes, starts {data[:4]!r}")
    dims = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8).reshape(shape)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Flip half of uint8 images [n, 28, 28] and shift each by up to SHIFT pixels, black outside."""
    n, height, width = images.shape
    flip = torch.rand(n, 1, 1, generator=rng) < 0.5
    padded = F.pad(torch.where(flip, images.flip(2), images), (SHIFT,) * 4)
    dy, dx = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=rng)
    rows, cols = dy + torch.arange(height), dx + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], cols[:, None, :]]


def stratified(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Sorted indices of `per_class` images of each class, drawn at random."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=rng)
    picked = [order[labels[order] == c][:per_class] for c in range(len(demo.CLASSES))]
    return torch.cat(picked).sort().values


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as Swin's own recipe has it."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.ndim > 1 and "relative_position" not in name]
    rest = [p for name, p in named if p.ndim <= 1 or "relative_position" in name]
    return [{"params": decays}, {"params": rest, "weight_decay": 0.0}]


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[nn.Module, int, int]:
    """The averaged model, the number of optimizer steps and of steps in one epoch."""
    rng = torch.Generator().manual_seed(args.seed)
    net = demo.build_model(drop_path=DROP_PATH)
    averaged = demo.build_model()
    averaged.load_state_dict(net.state_dict())
    pairs = list(averaged.parameters()), list(net.parameters())
    forward = torch.compile(net) if args.compile else net
    optimizer = torch.optim.AdamW(groups(net), lr=LR, weight_decay=WEIGHT_DECAY)
    per_epoch = len(images) // BATCH
    step, progress, start = 0, 0.0, time.monotonic()
    while progress < 1:
        net.train()
        order = torch.randperm(len(images), generator=rng)
        total = torch.zeros(())
        for batch in order[: per_epoch * BATCH].split(BATCH):
            # Progress is by steps or by the clock, whichever is ahead: a slow machine anneals too.
            minutes = (time.monotonic() - start) / 60
            progress = max(step / (per_epoch * args.epochs), minutes / args.minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * progress))
                group["lr"] = LR * min(cosine, (progress + 1e-3) / WARMUP)
            x = demo.to_input(augment(images[batch], rng))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = forward(x).float()
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            with torch.no_grad():
                decay = min(EMA, (1 + step) / (10 + step))
                torch._foreach_lerp_(*pairs, 1 - decay)
            total += loss.detach()
            if step % 100 == 0 and args.verbose:
                print(f"  step {step}: loss {loss:.3f}, {minutes:.1f} min", flush=True)
        done = (step - 1) % per_epoch + 1
        minutes = (time.monotonic() - start) / 60
        print(
            f"epoch {step / per_epoch:.2f}: loss {total / done:.4f}, {minutes:.1f} min", flush=True
        )
    return averaged, step, per_epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--out", type=Path, default=demo.HERE, help="folder to write to")
    parser.add_argument("--epochs", type=float, default=25)
    parser.add_argument("--minutes", type=float, default=math.inf, help="anneal by then at latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: twice as fast")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_x = read_idx(args.data, "train-images-idx3-ubyte")
    train_y = read_idx(args.data, "train-labels-idx1-ubyte").long()
    test_x = read_idx(args.data, "t10k-images-idx3-ubyte")
    test_y = read_idx(args.data, "t10k-labels-idx1-ubyte").long()
    net, steps, per_epoch = train(train_x, train_y, args)
    test = demo.accuracy(net, test_x, test_y)
    print(f"test accuracy {test:.2f} % of {len(test_y):,} images")

    picked = stratified(test_y, PER_CLASS, args.seed)
    sample = {"images": test_x[picked], "labels": test_y[picked].to(torch.uint8)}
    source = "Fashion-MNIST test images, MIT licence, Zalando Research"
    save_file(sample, args.out / demo.SAMPLE.name, {"source": source, "seed": str(args.seed)})
    metadata = {
        "architecture": "timm.models.swin_transformer.SwinTransformer",
        "config": json.dumps(demo.CONFIG),
        "data": "Fashion-MNIST, 60,000 training images",
        "mean": str(demo.MEAN),
        "std": str(demo.STD),
        "epochs": f"{steps / per_epoch:.2f}",
        "batch_size": str(BATCH),
        "learning_rate": str(LR),
        "weight_decay": str(WEIGHT_DECAY),
        "seed": str(args.seed),
        "precision": "bfloat16 autocast, float32 weights" if args.bf16 else "float32",
        "test_accuracy": f"{test:.2f}",
        "sample_accuracy": f"{demo.accuracy(net, test_x[picked], test_y[picked]):.2f}",
    }
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, args.out / demo.CHECKPOINT.name, metadata)
    print(json.dumps(metadata, indent=2))


if __name__ == "__main__":
    main()

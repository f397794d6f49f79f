"""The paper's protocol from end to end, on random data with a micro model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dimap
import forked
import pytest
import torch

pytest.importorskip("timm")
PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
DOCS = PAPER.parents[1] / "docs"


def script(name: str, *arguments: object, folder: Path) -> str:
    command = [forked.python(), str(PAPER / name), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the protocol has run once."""
    folder = tmp_path_factory.mktemp("paper")
    script("run.py", *ARGUMENTS, "--out", "out", "--jobs", 2, folder=folder)
    return folder


ARGUMENTS = ("--micro", "--data", "random", "--cache", "cache", "--device", "cpu")


def results(folder: Path, out: str = "out") -> dict:
    return json.loads((folder / out / "micro.json").read_text())


def test_every_cell_is_there(folder: Path) -> None:
    cells = results(folder)["cells"]
    trained = [c for c in cells if c["kind"] == "train"]
    assert [c["seed"] for c in trained] == [0, 1]
    for seed in (0, 1):
        mine = {
            (c["method"], c.get("scope"), c["ratio"]): c
            for c in cells
            if c["kind"] == "prune" and c["seed"] == seed
        }
        methods = dimap.methods.METHODS
        want = {("dense", None, 0.0)}
        want |= {(m, None, r) for m in methods for r in (0.5, 0.9)}
        want |= {("dimap", s, r) for s in ("type", "stage", "block") for r in (0.5, 0.9)}
        assert mine.keys() == want
        assert all(("tuned" in c) == (s is None or r == 0.5) for (_, s, r), c in mine.items())
        kept = mine["dimap", None, 0.9]["kept"]
        assert kept == pytest.approx(dict.fromkeys(("qkv", "proj", "mlp"), 0.1), abs=0.02)


def test_a_second_run_uses_what_is_cached_and_repeats_the_rest(folder: Path) -> None:
    cache = sorted((folder / "cache").glob("*.json"))
    redone = next(p for p in cache if "prune" in p.name)
    kept = {p: p.stat().st_mtime_ns for p in cache if p != redone}
    redone.unlink()
    script("run.py", *ARGUMENTS, "--out", "again", "--jobs", 1, folder=folder)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    times = ("seconds", "cpu_seconds")
    first, second = (
        [{k: v for k, v in c.items() if k not in times} for c in results(folder, out)["cells"]]
        for out in ("out", "again")
    )
    assert first == second


def test_the_report_fills_the_page(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    page = folder / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    script("report.py", "out/micro.json", "--page", page, "--images", "images", folder=folder)
    text = page.read_text()
    assert "| weights removed | 50 % | 90 % |" in text
    assert "| less `lamp` |" in text
    for name in ("paper-accuracy.png", "paper-scopes.png"):
        assert (folder / "images" / name).stat().st_size > 5000


def test_the_report_of_one_trained_model_pairs_hundreds_of_images(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    made = results(folder)
    made["settings"] |= {"name": "large", "seeds": [0]}
    made["cells"] = [c for c in made["cells"] if c.get("seed") == 0]
    for cell in made["cells"]:
        right = {"dimap": [80, 82, 84], "lamp": [70, 73, 74]}.get(cell.get("method"), [50, 51, 50])
        cell |= {f"{name}_hundreds": right for name in ("one_shot", "tuned") if name in cell}
    (folder / "large.json").write_text(json.dumps(made))
    page = folder / "large.md"
    page.write_text((DOCS / "results.md").read_text())
    script("report.py", "large.json", "--page", page, "--images", "large", folder=folder)
    text = page.read_text()
    assert "| `dimap` | **82.0 ± 1.2** | **82.0 ± 1.2** |" in text
    assert "| less `lamp` | **+9.7 ± 0.3** | **+9.7 ± 0.3** |" in text
    assert (folder / "large" / "paper-large.png").stat().st_size > 5000


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a file of the protocol by its name; afterwards they are gone."""
    monkeypatch.syspath_prepend(PAPER)
    path, before = list(sys.path), set(sys.modules)
    yield importlib.import_module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if "torch" not in name and name.partition(".")[0] in PROTOCOL:
            del sys.modules[name]


PROTOCOL = ("settings", "work", "run", "vit", "report", "plots", "model", "train")


def test_ahead_needs_every_seed(paper: Callable[[str], Any]) -> None:
    paired = paper("report").paired
    assert paired({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.0, 2: 1.0})[2]
    assert not paired({0: 2.0, 1: 2.1, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0})[2]
    mean, error, ahead = paired({0: 1.1, 1: 3.0, 2: 1.2}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (round(mean, 2), round(error, 2), ahead) == (0.77, 0.62, False)


def test_ahead_on_images_needs_three_standard_errors(paper: Callable[[str], Any]) -> None:
    paired = paper("report").paired
    zero = dict.fromkeys(range(9), 0.0)
    gaps = dict(enumerate([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, -1.0]))
    mean, error, ahead = paired(gaps, zero)
    assert (round(mean, 3), round(error, 3), ahead) == (1.556, 0.412, True)
    assert paired(zero, gaps)[0] == -mean
    assert not paired({**gaps, 8: -2.0}, zero)[2]  # 1.44 ± 0.50


def trained(paper: Callable[[str], Any], total: int, **options: Any) -> tuple[int, torch.Tensor]:
    """Steps and weights of the micro model after a training."""
    work, demo = paper("work"), paper("model")
    torch.manual_seed(0)
    net = demo.build_model(paper("settings").MICRO.config)
    optimizer = torch.optim.AdamW(work.groups(net))
    data = work.images(work.Places("random", Path()), "train")
    shared = {"lr": 1e-3, "batch": 16, "seed": 0, "device": "cpu", "bf16": True}
    steps, earlier = work.steps(net, optimizer, data, total=total, **shared, **options)
    assert (earlier > 0) == ("state" in options)
    return steps, torch.cat([p.detach().flatten() for p in net.parameters()])


def test_a_training_that_was_ended_goes_on_to_the_same_weights(
    paper: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper("work"), "SAVE_SECONDS", 0)
    want = trained(paper, 12)
    state, real, count = tmp_path / "state", torch.optim.AdamW.step, 0

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            trained(paper, 12, state=state)
    assert torch.load(state)["step"] == 7
    steps, weights = trained(paper, 12, state=state)
    assert (steps, want[0]) == (12, 12)
    assert torch.equal(weights, want[1])
    assert not state.exists()


def test_a_training_ends_with_its_decay_done_when_the_clock_says_so(
    paper: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rates, now = paper("work"), list[float](), 1000.0
    clock = SimpleNamespace(time=lambda: now, monotonic=lambda: now)
    real = work.augment

    def augment(*arguments: Any) -> Any:  # every step takes a second; the tenth is held up for 20
        nonlocal now
        now += 21 if len(rates) == 10 else 1
        return real(*arguments)

    def set_rate(optimizer: Any, lr: float, done: float) -> None:
        rates.append(done)

    for name, value in (("time", clock), ("augment", augment), ("set_rate", set_rate)):
        monkeypatch.setattr(work, name, value)
    steps, _ = trained(paper, 10_000, until=1060.0)
    assert steps == len(rates)
    assert 38 <= steps <= 42
    assert 1058 <= now <= 1061
    assert rates[-1] == 1
    assert all(0 < b - a < 0.06 for a, b in pairwise(rates))  # not even at the stop


def small_vit() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="",
    )
    with torch.no_grad():
        for weight in net.blocks.parameters():
            weight *= 10 if weight.ndim > 1 else 1  # as fresh they would hardly matter
    return net.eval()


@pytest.fixture
def judged(
    paper: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs a cell of features: a small ViT with random weights, pictures of random blocks."""
    from PIL import Image

    work, vit = paper("work"), paper("vit")
    rng = torch.Generator().manual_seed(0)
    for i in range(5):
        blocks = torch.randint(256, (9, 12, 3), generator=rng).to(torch.uint8)
        Image.frombytes("RGB", (12, 9), bytes(blocks.flatten().tolist())).resize((80, 60)).save(
            tmp_path / f"{i}.jpg"
        )
    monkeypatch.setattr(vit, "load_backbone", lambda path, size: small_vit())
    monkeypatch.setattr(vit, "photographs", lambda: [tmp_path / "0.jpg", tmp_path / "1.jpg"])
    places = work.Places("", tmp_path, tmp_path, tmp_path)

    def judge(method: str, ratio: float, **more: Any) -> dict[str, Any]:
        cell = {"kind": "features", "size": 28, "method": method, "ratio": ratio, "tune": None}
        return dict(work.features(cell | more, places))

    return judge


def test_features_of_a_model_that_lost_nothing_are_the_same(judged: Callable[..., Any]) -> None:
    assert judged("dimap", 0.0) == {"class": [1.0] * 8, "patch": [1.0] * 8}


def test_features_are_the_cosines_of_tokens(
    judged: Callable[..., Any], paper: Callable[[str], Any], tmp_path: Path
) -> None:
    vit = paper("vit")
    pruned = small_vit()
    dimap.prune(pruned, 0.5, method="uniform")
    made = judged("uniform", 0.5)
    crops = torch.cat([vit.corners(path, 28) for path in vit.photographs()])
    with torch.inference_mode():
        a, b = (net(vit.to_input(crops)).double() for net in (small_vit(), pruned))
    cosine = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))
    assert made["class"] == pytest.approx(cosine[:, 0].tolist(), abs=2e-5)
    assert made["patch"] == pytest.approx(cosine[:, 1:].mean(1).tolist(), abs=2e-5)
    assert max(made["class"]) < 0.999


def test_features_recover_without_labels(judged: Callable[..., Any]) -> None:
    tune = {"steps": 60, "size": 28, "batch": 8, "lr": 1e-3}
    for options in ({"method": "dimap"}, {"method": "taylor", "calibration": 4}):
        made = judged(ratio=0.7, tune=tune, **options)
        assert made == judged(ratio=0.7, tune=tune, **options)
        for token in ("patch", "class"):
            assert sum(made[f"{token}_tuned"]) > sum(made[token]) + 0.1
    plain = judged("taylor", 0.7, calibration=4)
    assert plain == {name: made[name] for name in ("patch", "class")}
    assert plain != judged("taylor", 0.7, calibration=5)


def test_taylor_by_random_signs_keeps_what_the_tokens_depend_on(
    judged: Callable[..., Any],
) -> None:
    # Random weights are all alike, so a few signs must beat magnitude by what the tokens say.
    by_tokens, by_size = (
        judged(method, 0.8, **more)
        for method, more in (("taylor", {"calibration": 16}), ("global_magnitude", {}))
    )
    assert sum(by_tokens["patch"]) > sum(by_size["patch"])


def test_crops_lie_within_the_photograph(paper: Callable[[str], Any], tmp_path: Path) -> None:
    from PIL import Image

    vit = paper("vit")
    image = Image.new("RGB", (90, 60), (10, 20, 30))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png")
    crops = vit.corners(tmp_path / "a.png", 28)
    assert crops.shape == (4, 3, 28, 28)
    assert crops.dtype == torch.uint8
    assert [int(c.max()) > 40 for c in crops] == [True, False, False, False]
    assert crops[3].unique().tolist() == [10, 20, 30]
    whole = vit.read(tmp_path / "a.png", 60)
    rng = torch.Generator().manual_seed(0)
    many = torch.stack([vit.random_crop(whole, 14, rng) for _ in range(40)])
    assert many.shape == (40, 3, 14, 14)
    assert {10, 20, 30} <= set(many.unique().tolist())


def test_the_report_of_features_pairs_photographs(
    paper: Callable[[str], Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    settings, report = paper("settings"), paper("report")
    s = replace(settings.FEATURES, ratios=(0.5,), tune_ratios=(0.5,))
    cells = settings.feature_cells(s)
    kinds = list(dict.fromkeys((c["method"], c.get("scope")) for c in cells))
    for cell in cells:
        less = 0.01 * kinds.index((cell["method"], cell.get("scope")))
        crops = [0.9 - less + 0.001 * n for n in range(20)]
        names = ["patch", "class", *(["patch_tuned", "class_tuned"] if cell["tune"] else [])]
        cell |= dict.fromkeys(names, crops) if cell["method"] != "dense" else {"difference": 2e-5}
    head = {"schema": "dimap.paper", "version": 1, "settings": asdict(s), "cpu_minutes": 1.0}
    made = {**head, "machine": "none", "torch": "none", "cells": cells}
    (tmp_path / "features.json").write_text(json.dumps(made))
    run = report.Run.read(tmp_path / "features.json")
    assert run.values("lamp", 0.5, "patch")[1] == pytest.approx(0.9 - 0.02 + 0.0055)
    page = tmp_path / "results.md"
    page.write_text((DOCS / "results.md").read_text())
    arguments = (tmp_path / "features.json", "--page", page, "--images", tmp_path)
    script("report.py", *arguments, folder=tmp_path)
    text = page.read_text()
    assert "| less `lamp` | **+0.010 ± 0.000** |" in text
    assert "| less Eq. 10, for each block | **+0.070 ± 0.000** |" in text
    assert (tmp_path / "paper-features.png").stat().st_size > 5000


def test_one_trained_model_is_judged_by_hundreds_of_images(
    paper: Callable[[str], Any],
) -> None:
    settings, work = paper("settings"), paper("work")
    s = replace(settings.MICRO, seeds=(0,), tunes=(0.9,), bf16=True, threads=1)
    (start,) = settings.train_cells(s)
    cells = list(settings.prune_cells(s, start))
    assert all(cell["hundreds"] and cell["bf16"] for cell in cells)
    assert {c["ratio"] for c in cells if c["tune"] and "scope" not in c} == {0.0, 0.9}
    net = paper("model").build_model(s.config)
    x = torch.randint(256, (230, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        labels = net.eval()(paper("model").to_input(x)).argmax(1)
    labels[150] += 1
    assert work.hits(net, (x, labels), "cpu") == [100, 99, 30]

"""Fine-tuning: pruned weights stay zero, runs resume to the same bits, errors come first."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import dimap
import forked
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from dimap.cli.finetune import finetune as finetune_command
from dimap.distributed.ranks import Ranks
from dimap.finetuning import data as _data
from dimap.finetuning import training as _training
from dimap.finetuning.settings import Settings
from dimap.finetuning.training import distilled
from finetune_problems import (
    ARCHITECTURE,
    CONFIG,
    QUICK,
    Interrupted,
    Squares,
    assert_zero,
    pruned,
    save_images,
    save_swin,
    swin,
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Threads that share small layers wait for each other, on a busy machine most of the time."""
    threads(1)


CPU = Ranks(), torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pruned checkpoint, file of masks, masks, folder of images); not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    return *pruned(folder), save_images(folder / "images")


def tensors_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return bool(a == b)


def assert_same_file(path: Path, other: Path) -> None:
    """The same tensors and metadata, in whatever order the library writes the metadata."""
    assert tensors_equal(load_file(path), load_file(other))
    with safe_open(path, framework="pt") as a, safe_open(other, framework="pt") as b:
        assert a.metadata() == b.metadata()


def assert_same_run(out: Path, other: Path) -> None:
    """The same bits in all that a run writes; only clocks differ."""
    for name in ("best.safetensors", "last.safetensors"):
        assert_same_file(out / name, other / name)
    state, others = (torch.load(each / "state.pt") for each in (out, other))
    assert tensors_equal(state, others)


# What a run does


def test_masked_run_learns_and_zeros_stay(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    result = dimap.finetune(
        checkpoint, images, masks_file, out=tmp_path / "run", **{**QUICK, "epochs": 6}
    )
    assert [row["epoch"] for row in result.history] == list(range(7))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.best_top1 == max(row["top1"] for row in result.history)
    source = load_file(checkpoint)
    for path in (result.best, result.last):
        assert_zero(path, masks)
        assert {n: t.shape for n, t in load_file(path).items()} == {
            n: t.shape for n, t in source.items()
        }
    with safe_open(result.best, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "architecture", "config", "epoch", "top1"}
    assert metadata["architecture"] == ARCHITECTURE
    assert json.loads(metadata["config"]) == CONFIG
    assert metadata["epoch"] == str(result.best_epoch)
    written = json.loads((tmp_path / "run" / "history.json").read_text())
    assert written["epochs"] == result.history
    assert written["settings"]["lr"] == 2e-3


def test_the_result_can_be_fine_tuned_and_inspected_again(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    first = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", **QUICK)
    judged = dimap.finetune(first.best, images, out=tmp_path / "b", **{**QUICK, "epochs": 0})
    assert judged.best_top1 == first.best_top1
    again = dimap.finetune(first.last, images, out=tmp_path / "c", **{**QUICK, "epochs": 1})
    assert_zero(again.last, masks)


def test_without_masks_the_zeros_of_the_checkpoint_hold(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    a = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", **QUICK)
    b = dimap.finetune(checkpoint, images, None, out=tmp_path / "b", **QUICK)
    assert_same_file(a.last, b.last)


def test_masks_prune_a_dense_checkpoint(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    dense = checkpoint.with_name("dense.safetensors")
    a = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", **QUICK)
    b = dimap.finetune(
        dense, images, masks_file, out=tmp_path / "b", allow_mask_change=True, **QUICK
    )
    assert tensors_equal(load_file(a.last), load_file(b.last))


def test_empty_masks_hold_nothing(made, tmp_path) -> None:
    checkpoint, _, masks, images = made
    result = dimap.finetune(checkpoint, images, {}, out=tmp_path / "run", **QUICK)
    weights = load_file(result.last)
    assert all(weights[name][~mask].any() for name, mask in masks.items())


def test_a_module_is_trained_in_place_on_data_sets(tmp_path) -> None:
    model = swin()
    masks = dict(dimap.prune(model, 0.5).masks)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = dimap.finetune(
        model, (Squares(20), Squares(7, seed=1)), masks, out=tmp_path / "run", **QUICK
    )
    assert_zero(result.last, masks)
    weights = load_file(result.last)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not torch.equal(before["head.fc.weight"], model.head.fc.weight)


def test_average_of_weights_is_judged_and_kept(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    result = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "run", ema=0.9, **QUICK)
    state = torch.load(tmp_path / "run" / "state.pt")
    assert tensors_equal(load_file(result.last), dict(sorted(state["ema"].items())))
    assert not tensors_equal(state["ema"], state["model"])
    assert_zero(result.last, masks)


def test_validation_counts_each_image_once(tmp_path) -> None:
    model = swin().eval()
    validation = Squares(7, seed=1)
    result = dimap.finetune(
        model, (Squares(8), validation), {}, out=tmp_path / "run",
        **{**QUICK, "epochs": 0, "batch_size": 4, "amp": "none", "crop_pct": 1.0},
    )  # fmt: skip
    mean, std = (
        torch.tensor(n).view(3, 1, 1) for n in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    batch = [validation[i] for i in range(7)]
    x = torch.stack([(torch.as_tensor(image) / 255 - mean) / std for image, _ in batch])
    y = torch.tensor([label for _, label in batch])
    with torch.no_grad():
        output = model(x)
    [row] = result.history
    assert row["top1"] == pytest.approx(100 * (output.argmax(1) == y).double().mean().item())
    assert row["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(output, y).item(), rel=1e-4
    )


def test_fashion_mnist_from_local_files_with_one_channel(tmp_path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    checkpoint, masks_file, masks = pruned(tmp_path, in_chans=1, num_classes=10)
    spec = f"torch/fashion_mnist:{tmp_path}"
    result = dimap.finetune(checkpoint, spec, masks_file, out=tmp_path / "run", **QUICK)
    assert_zero(result.last, masks)


def test_new_head_for_other_classes(tmp_path) -> None:
    checkpoint, _, masks = pruned(tmp_path, num_classes=11)
    images = save_images(tmp_path / "images")
    result = dimap.finetune(checkpoint, images, masks, out=tmp_path / "a", reset_head=True, **QUICK)
    assert load_file(result.best)["head.fc.weight"].shape[0] == 3
    again = dimap.finetune(result.best, images, out=tmp_path / "b", **{**QUICK, "epochs": 0})
    assert again.best_top1 == result.best_top1


def takes(channels: int, side: int) -> dict[str, Any]:
    half = (0.5,) * channels
    size = channels, side, side
    return {
        "input_size": size,
        "mean": half,
        "std": half,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }


@pytest.mark.parametrize(
    "policy", ["rand-m10-inc1", "v0", "original-mstd0.5", "3a", "augmix-m10", None]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_of_augmentation(policy, channels) -> None:
    settings = Settings(auto_augment=policy, batch_size=8, workers=0, pad=2, reprob=1.0)
    given = takes(channels, 16)
    torch.manual_seed(0)
    loader = _data.make_loader(Squares(160), given, settings, *CPU, training=True)
    for images, labels in loader:
        assert images.shape == (8, channels, 16, 16)
        assert images.isfinite().all()
        assert labels.max() < 3


def test_padding_is_black_and_comes_first() -> None:
    given = takes(3, 24)
    data = Squares(2)
    settings = Settings(pad=2, workers=0, batch_size=2)
    [(images, _)] = _data.make_loader(data, given, settings, *CPU, training=False)
    assert (images[:, :, :2] == -1).all()
    pixels = torch.from_numpy(np.stack([np.array(image) for image in data.images]))
    want = (pixels.permute(0, 3, 1, 2) / 127.5) - 1
    assert torch.allclose(images[:, :, 2:-2, 2:-2], want, atol=1e-5)


# Masks and the zeros of the checkpoint


def bits(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int32) for name, tensor in load_file(path).items()}


def changed(masks: dict[str, torch.Tensor], revived: int, pruned: int) -> dict[str, torch.Tensor]:
    """The masks, which keep so many of what they dropped and drop so many of what they kept."""
    name, mask = next(iter(masks.items()))
    flat = mask.clone().flatten()
    dropped, kept = (~flat).nonzero().flatten(), flat.nonzero().flatten()
    flat[dropped[:revived]], flat[kept[:pruned]] = True, False
    return {**masks, name: flat.reshape(mask.shape)}


@pytest.mark.parametrize(("revived", "pruned"), [(3, 0), (0, 5), (1, 2)])
@pytest.mark.parametrize("epochs", [0, 2])
def test_masks_of_other_zeros_are_refused(made, tmp_path, revived, pruned, epochs) -> None:
    checkpoint, _, masks, images = made
    message = f"would revive {revived} of its zeros and prune {pruned} more of its weights"
    with pytest.raises(ValueError, match=rf"{message} \(--masks-from-zeros .* --allow-mask-change"):
        dimap.finetune(
            checkpoint, images, changed(masks, revived, pruned), out=tmp_path / "run",
            **{**QUICK, "epochs": epochs},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_zeros_that_no_mask_holds_would_be_revived(made, tmp_path) -> None:
    checkpoint, _, masks, images = made
    name, mask = next(iter(masks.items()))
    part = {n: m for n, m in masks.items() if n != name}
    with pytest.raises(ValueError, match=f"revive {int((~mask).sum())} of its zeros and prune 0"):
        dimap.finetune(checkpoint, images, part, out=tmp_path / "run", **QUICK)


def test_masks_of_another_pruning_or_of_the_dense_model(made, tmp_path) -> None:
    checkpoint, _, masks, images = made
    dense, other = checkpoint.with_name("dense.safetensors"), tmp_path / "other.safetensors"
    total = sum(mask.numel() for mask in masks.values())
    dimap.prune_checkpoint(dense, tmp_path / "more.safetensors", 0.75, masks=other)
    more = sum(int((masks[n] & ~mask).sum()) for n, mask in dimap.load_masks(other).items())
    assert more > total // 8
    for arguments, counts in (
        ((checkpoint, images, other), f"revive 0 of its zeros and prune {more:,} more"),
        (
            (tmp_path / "more.safetensors", images, masks),
            f"revive {more:,} of its zeros and prune 0",
        ),
        ((dense, images, masks), f"revive 0 of its zeros and prune {total // 2:,} more"),
    ):
        with pytest.raises(ValueError, match=counts):
            dimap.finetune(*arguments, out=tmp_path / "run", **QUICK)
    result = dimap.finetune(
        checkpoint, images, other, out=tmp_path / "run", allow_mask_change=True, **QUICK
    )
    assert_zero(result.last, dimap.load_masks(other))


def test_the_zeros_of_the_checkpoint_in_the_place_of_masks(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    a = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", **QUICK)
    for name, given in (("b", changed(masks, 3, 4)), ("c", None)):
        b = dimap.finetune(
            checkpoint, images, given, out=tmp_path / name, masks_from_zeros=True, **QUICK
        )
        assert_same_file(a.last, b.last)


def test_a_model_that_is_not_known_is_checked_where_it_has_masks(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    weight = model[1].weight
    with torch.no_grad():
        weight[0, :9] = 0
    data, kept = (Squares(8), Squares(4)), weight.detach() != 0
    options = {**QUICK, "epochs": 1, "input_size": 16}
    with pytest.raises(ValueError, match="revive 9 of its zeros"):
        dimap.finetune(model, data, {"1.weight": kept | True}, out=tmp_path / "run", **options)
    dimap.finetune(model, data, {"1.weight": kept}, out=tmp_path / "run", **options)
    assert (weight == 0).sum() == 9


@pytest.mark.parametrize("masks_are", ["none", "other", "zeros", "dense"])
def test_no_epochs_change_no_weight(made, tmp_path, masks_are) -> None:
    checkpoint, masks_file, _, images = made
    source = checkpoint.with_name("dense.safetensors") if masks_are == "dense" else checkpoint
    state = load_file(source)
    state["head.fc.bias"][0], state["layers.0.blocks.0.mlp.fc1.weight"][0, :2] = -0.0, -0.0
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    from safetensors.torch import save_file

    save_file(state, tmp_path / "in.safetensors", metadata)
    options = {
        "none": {},
        "dense": {},
        "other": {"masks": masks_file, "allow_mask_change": True},
        "zeros": {"masks": masks_file, "masks_from_zeros": True},
    }[masks_are]
    result = dimap.finetune(
        tmp_path / "in.safetensors", images, out=tmp_path / "run", ema=0.5,
        **{**QUICK, "epochs": 0}, **options,
    )  # fmt: skip
    for path in (result.best, result.last):
        assert tensors_equal(bits(path), bits(tmp_path / "in.safetensors"))


def test_a_new_head_alone_is_new_without_training(made, tmp_path) -> None:
    checkpoint, _, _, images = made
    result = dimap.finetune(
        checkpoint, images, out=tmp_path / "a", reset_head=True, **{**QUICK, "epochs": 0}
    )
    before, after = bits(checkpoint), bits(result.last)
    changed = {n for n in before if not torch.equal(before[n], after.get(n, before[n][:0]))}
    assert changed == {name for name in before if name.startswith("head.")}


# Images that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "header"])
def test_an_image_that_cannot_be_read_is_named(made, tmp_path, damage, workers) -> None:
    checkpoint, masks_file, _, _ = made
    images = save_images(tmp_path / "images")
    bad = images / "train" / "green" / "4.png"
    data = bad.read_bytes()
    bad.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "text": b"no image at all",
            "header": data[:20] + b"\xff" * 8 + data[28:],
        }[damage]
    )
    options = {**QUICK, "workers": workers}
    with pytest.raises(ValueError, match="must be a readable image, got: ") as caught:
        dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "run", **options)
    text = str(caught.value)
    assert text.startswith(str(bad))
    assert "Traceback" not in text


# Distillation and clipping


def test_a_teacher_changes_the_run_and_without_a_share_does_not(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    dense = checkpoint.with_name("dense.safetensors")
    outs = {}
    for name, more in {
        "alone": {},
        "silent": {"teacher": dense, "distill_alpha": 0.0},
        "taught": {"teacher": dense, "distill_alpha": 0.7, "distill_temperature": 2.0},
    }.items():
        outs[name] = dimap.finetune(
            checkpoint, images, masks_file, out=tmp_path / name, **QUICK, **more
        ).last
        assert_zero(outs[name], masks)
    weights = {name: load_file(path) for name, path in outs.items()}
    assert tensors_equal(weights["alone"], weights["silent"])
    assert not tensors_equal(weights["alone"], weights["taught"])


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    settings = Settings(distill_alpha=1.0, distill_temperature=2.0)
    p, q = (torch.softmax(x.double() / 2, 1) for x in (teacher, student))
    want = 4 * (p * (p.log() - q.log())).sum() / 4
    got = distilled(torch.tensor(7.0), student, teacher, settings)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    settings = Settings(distill_alpha=0.25)
    assert float(distilled(torch.tensor(8.0), teacher, teacher, settings)) == pytest.approx(6.0)


def trainer(batches: int = 10, **options: Any) -> _training.Trainer:
    model = swin()
    masks = dimap.select(model, 0.5)
    return _training.Trainer(model, None, masks, 3, batches, *CPU, Settings(**options))


def test_clipping_sees_only_gradients_that_are_used() -> None:
    made = trainer(opt="momentum", momentum=0.0, lr=1.0, warmup_lr=1.0, clip_grad=0.5)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    for name, p in made.model.named_parameters():
        p.grad = torch.zeros_like(p)
        if name in made.holding.masks:
            p.grad[~made.holding.masks[name]] = 1e6
    made.model.head.fc.bias.grad.fill_(0.1)  # a norm of 0.17: nothing to clip
    made._step()
    moved = made.model.head.fc.bias - before["head.fc.bias"]
    assert torch.allclose(moved, torch.full((3,), -0.1))


def test_gradients_are_clipped() -> None:
    made = trainer(opt="momentum", momentum=0.0, lr=1.0, warmup_lr=1.0, clip_grad=0.5)
    before = made.model.head.fc.bias.detach().clone()
    for p in made.model.parameters():
        p.grad = torch.zeros_like(p)
    made.model.head.fc.bias.grad.fill_(3.0)
    made._step()
    assert float((made.model.head.fc.bias.detach() - before).norm()) == pytest.approx(0.5, rel=1e-4)


# The paper's settings


def test_defaults_are_the_papers() -> None:
    s = Settings()
    assert (s.opt, s.epochs, s.sched, s.lr, s.min_lr) == ("adamw", 30, "cosine", 2e-5, 2e-7)
    assert (s.warmup, s.warmup_lr, s.weight_decay) == (15, 2e-8, 1e-8)
    assert s.color_jitter > 0
    assert s.auto_augment
    assert s.reprob > 0
    assert s.mixup > 0
    assert s.cutmix > 0
    assert s.amp == "bfloat16"


def test_learning_rate_rises_for_half_and_falls_along_a_cosine() -> None:
    made = trainer(batches=10)
    rates = []
    for update in range(300):
        rates.append(max(g["lr"] for g in made.optimizer.param_groups))
        made.scheduler.step_update(update + 1)
    assert rates[0] == pytest.approx(2e-8)
    assert rates[75] == pytest.approx((2e-8 + 2e-5) / 2, rel=0.01)
    assert rates[150] == pytest.approx(2e-5)
    assert rates[225] == pytest.approx((2e-7 + 2e-5) / 2, rel=0.01)
    assert rates[299] == pytest.approx(2e-7, rel=0.05)
    assert max(rates) == rates[150]


def test_steps_of_accumulated_batches_are_those_of_larger_ones(tmp_path) -> None:
    out = []
    quiet = {"augment": False, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "amp": "none"}
    for batch_size, accumulate in ((8, 1), (4, 2)):
        result = dimap.finetune(
            swin(drop_path_rate=0.0), (Squares(16), Squares(4)), {}, out=tmp_path / str(accumulate),
            **{**QUICK, **quiet, "epochs": 1, "batch_size": batch_size, "accumulate": accumulate},
        )  # fmt: skip
        out.append(load_file(result.last))
    for name in out[0]:
        # Not to the bit, and Adam divides by small numbers.
        assert torch.allclose(out[0][name], out[1][name], atol=2e-4), name


def test_every_setting_is_an_option_of_the_command() -> None:
    import inspect

    names = set(inspect.signature(finetune_command).parameters)
    assert set(Settings.model_fields) <= names


def invoke(*arguments: object) -> Any:
    from dimap.cli import app
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def test_the_command_takes_options_and_prints_json(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    options = ["--mean", "0.5,0.5,0.4", "--std", "0.5", "--auto-augment", "none", "--no-augment"]
    options += ["--epochs", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--json"]
    ran = invoke(
        checkpoint, "--data", images, "--masks", masks_file, "--out", tmp_path / "run", *options
    )
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["best"] == str(tmp_path / "run" / "best.safetensors")
    settings = json.loads((tmp_path / "run" / "history.json").read_text())["settings"]
    assert settings["mean"] == [0.5, 0.5, 0.4]
    assert settings["auto_augment"] is None
    assert settings["augment"] is False
    assert_zero(tmp_path / "run" / "last.safetensors", masks)


def test_without_a_terminal_lines_tell_how_far_it_is(made, tmp_path, monkeypatch) -> None:
    checkpoint, masks_file, _, images = made
    options = ["--epochs", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
    arguments = [
        checkpoint,
        "--data",
        images,
        "--masks",
        masks_file,
        *options,
        "--warmup-epochs",
        0,
    ]
    ran = invoke(*arguments, "--out", tmp_path / "a")
    assert [line.split(",")[0] for line in ran.stderr.splitlines()] == ["epoch 0/1", "epoch 1/1"]
    monkeypatch.setattr("dimap.finetuning.run.QUIET", -1.0)
    ran = invoke(*arguments, "--out", tmp_path / "b")
    assert "epoch 1/1, step 1 of " in ran.stderr


def test_the_command_tells_errors_in_a_sentence(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    out = tmp_path / "run"
    ran = invoke(checkpoint, "--data", tmp_path / "nowhere", "--out", out)
    assert ran.exit_code == 1
    assert "nowhere: must be a folder of images for --data" in ran.stderr
    ran = invoke(checkpoint, "--data", images, "--masks", masks_file, "--dense", "--out", out)
    assert ran.exit_code == 1
    assert "--dense holds nothing" in ran.stderr
    ran = invoke(checkpoint, "--data", images, "--mean", "gray", "--out", out)
    assert ran.exit_code == 2
    assert not out.exists()


# Resuming

FULL = {"epochs": 3, "ema": 0.9, "accumulate": 2, "clip_grad": 1.0, "batch_size": 4}


@pytest.mark.parametrize("options", [{}, {"amp": "float16"}, {"workers": 2}], ids=str)
def test_an_interrupted_run_resumes_to_the_same_bits(made, tmp_path, options) -> None:
    checkpoint, masks_file, _, _ = made
    settings = {**QUICK, **FULL, **options}
    data = Squares(20), Squares(7, seed=1)
    whole = dimap.finetune(checkpoint, data, masks_file, out=tmp_path / "whole", **settings)

    torch.manual_seed(123)  # nothing of this process matters
    np.random.seed(5)
    failing = Squares(20, fails_in=2)
    with pytest.raises(Interrupted):
        dimap.finetune(
            checkpoint, (failing, Squares(7, seed=1)), masks_file, out=tmp_path / "cut", **settings
        )
    left = json.loads((tmp_path / "cut" / "history.json").read_text())["epochs"]
    assert [row["epoch"] for row in left] == [0, 1]
    torch.manual_seed(7)
    data = Squares(20), Squares(7, seed=1)
    resumed = dimap.finetune(
        checkpoint, data, masks_file, out=tmp_path / "cut", resume=True, **settings
    )
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert tensors_equal(whole.history, resumed.history)


def test_resuming_where_no_run_is(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    for name, files, held in (("empty", (), "an empty folder"), ("other", ("a.txt",), "a.txt")):
        out = tmp_path / name
        out.mkdir()
        for file in files:
            (out / file).touch()
        ran = invoke(
            checkpoint, "--data", images, "--masks", masks_file, "--out", out, "--resume",
            "--epochs", 1, "--batch-size", 8, "--workers", 0, "--device", "cpu",
        )  # fmt: skip
        assert ran.exit_code == 1
        wanted = f"{out}: must hold a run for --resume (state.pt), got {held}; without --resume"
        assert wanted in ran.stderr
        assert sorted(child.name for child in out.iterdir()) == sorted(files)


def test_resuming_what_is_finished_or_not_begun(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    first = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", resume=True, **QUICK)
    before = first.last.read_bytes()  # not even written again
    again = dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "a", resume=True, **QUICK)
    assert first.last.read_bytes() == before
    assert tensors_equal(again.history, first.history)
    assert again.best_epoch == first.best_epoch


def command(*arguments: object, processes: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [forked.python(), *(torchrun if processes > 1 else [])]
    return [*start, "-m", "dimap", "finetune", *map(str, arguments)]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


# `dimap`, which ends itself when it has told of epoch 1, as `kill` would.
TERMINATED = """
import os, signal, sys
class Terminating:
    def __init__(self, stream):
        self.stream = stream
    def __getattr__(self, name):
        return getattr(self.stream, name)
    def write(self, text):
        self.stream.write(text)
        if text.startswith("epoch 1/"):
            os.kill(os.getpid(), signal.SIGTERM)
sys.stderr = Terminating(sys.stderr)
from dimap.cli import main
main()
"""


def test_a_terminated_command_resumes_to_the_same_bits(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    settings = {"epochs": 4, "batch_size": 2, "workers": 0, "lr": 1e-3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    options += ["--data", str(images), "--masks", masks_file, "--device", "cpu"]
    cut = [forked.python(), "-c", TERMINATED, "finetune", str(checkpoint), *map(str, options)]
    cut += ["--out", str(tmp_path / "cut"), "--resume"]
    done = subprocess.run(cut, env=ENV, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not [f for f in (tmp_path / "cut").iterdir() if f.name.endswith(".dimap-tmp")]
    left = json.loads((tmp_path / "cut" / "history.json").read_text())["epochs"]
    assert 2 <= len(left) < 5
    arguments: Any = {**settings, "device": "cpu", "progress": False}
    dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "whole", **arguments)
    dimap.finetune(checkpoint, images, masks_file, out=tmp_path / "cut", resume=True, **arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_torchrun_with_two_processes(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    options = ["--data", images, "--masks", masks_file, "--out", tmp_path / "run", "--epochs", 1]
    options += [
        "--batch-size",
        4,
        "--accumulate",
        2,
        "--workers",
        0,
        "--device",
        "cpu",
        "--lr",
        1e-3,
        "--json",
    ]
    ran = subprocess.run(
        command(checkpoint, *options, processes=2),
        env=ENV,
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(ran.stdout)  # one process speaks
    assert_zero(tmp_path / "run" / "last.safetensors", masks)
    # 7 validation images, an odd number: each counted once.
    alone = dimap.finetune(found["last"], images, out=tmp_path / "alone", **{**QUICK, "epochs": 0})
    assert alone.history[0]["top1"] == pytest.approx(found["history"][-1]["top1"])
    assert alone.history[0]["loss"] == pytest.approx(found["history"][-1]["loss"], rel=1e-3)


def test_tensorboard_logs(made, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint, masks_file, _, images = made
    result = dimap.finetune(
        checkpoint, images, masks_file, out=tmp_path / "run", tensorboard=True, **QUICK
    )
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [e.step for e in log.Scalars("top1")] == [0, 1, 2]
    got = [e.value for e in log.Scalars("train/loss")]
    assert got == pytest.approx([row["train_loss"] for row in result.history[1:]])


# Errors, before any work


def test_errors_come_before_any_work(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    out = tmp_path / "run"

    def refused(kind: type[Exception], text: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"model": checkpoint, "data": images, "masks": masks_file}
        with pytest.raises(kind, match=text):
            dimap.finetune(**{**arguments, "out": out, **QUICK, **changes})
        assert not out.exists()

    # Data
    refused(FileNotFoundError, "must be a folder of images", data=tmp_path / "nowhere")
    (tmp_path / "flat" / "red").mkdir(parents=True)
    refused(
        FileNotFoundError, "must have a folder train or training, got red", data=tmp_path / "flat"
    )
    only = save_images(tmp_path / "only", train=3, validation=0)
    refused(FileNotFoundError, "must have a folder validation or val", data=only)
    refused(ValueError, "data set of timm's factory", data=f"torch/unheard_of:{images}")
    refused(
        FileNotFoundError,
        "files of torchvision's fashion_mnist",
        data=f"torch/fashion_mnist:{images}",
    )
    two = save_images(tmp_path / "two", validation=2)
    refused(ValueError, "same classes, got 3 and 2, differing in blue", data=two)
    refused(TypeError, "two data sets that have a `transform`", data=(1, 2))
    refused(ValueError, "at most 20, the training images of each process, got 64", batch_size=64)
    # The model
    save_swin(tmp_path / "ten.safetensors", num_classes=10)
    refused(
        ValueError,
        r"one output for each of the 3 classes of the data, got 10 \(--reset-head",
        model=tmp_path / "ten.safetensors",
        masks={},
    )
    refused(FileNotFoundError, "No such file", model=tmp_path / "none.safetensors")
    bare = tmp_path / "bare.safetensors"
    from safetensors.torch import save_file

    save_file(load_file(checkpoint), bare)
    refused(ValueError, "does not say which timm model it is", model=bare)
    for name in ("swin_tiny_patch4_window7_224", "timm:swin_tiny_patch4_window7_224"):
        claim = "must hold the weights of timm's swin_tiny"
        refused(ValueError, claim, model=bare, timm_model=name)
    refused(ValueError, r"must take images \[3, 24, 24\]", model=swin(), masks={}, input_size=24)
    # Masks
    other = swin(embed_dim=16)
    dimap.prune(other, 0.5).save_masks(tmp_path / "other.safetensors")
    refused(
        ValueError,
        r"must hold masks of .*the mask of layers.0.*must have the weight's shape",
        masks=tmp_path / "other.safetensors",
    )
    refused(
        ValueError, "got none called blocks.0", masks={"blocks.0": torch.ones(1, dtype=torch.bool)}
    )
    refused(
        ValueError,
        "has no zeros to hold",
        model=checkpoint.with_name("dense.safetensors"),
        masks=None,
    )
    # Settings and the rest
    refused(TypeError, "options must be among epochs, .*, got learning_rate", learning_rate=1.0)
    refused(
        ValueError,
        "teacher must have 3 outputs as the model has, got 10",
        teacher=tmp_path / "ten.safetensors",
    )
    refused(ValueError, "opt must be an optimizer of timm, got 'x'", opt="x")
    refused(ValueError, "got 'adamww'; near it are .*adamw", opt="adamww")
    refused(ValueError, "sched must be 'cosine', .*, got 'x'", sched="x")
    refused(ValueError, "timm must be able to load images", auto_augment="rand-x9")
    refused(ValueError, "got 'randd'; near it are rand$", auto_augment="randd")
    refused(ValueError, "got 'orginal-m9'; near it are original, ", auto_augment="orginal-m9")
    refused(ValueError, "interpolation must be 'nearest', .*, got 'x'", interpolation="x")
    refused(TypeError, "got weight_deca; near it are weight_decay", weight_deca=0.1)
    refused(ValueError, "device must be one that torch knows, got 'potato'", device="potato")
    if not torch.cuda.is_available():
        refused(ValueError, "torch sees none", device="cuda")


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"lr": 0.0}, ValueError, "lr must be greater than 0, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a valid number, got 'fast'"),
        ({"epochs": -1}, ValueError, "epochs must be greater than or equal to 0, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs must be a valid integer, got 1.5"),
        ({"warmup_epochs": 30}, ValueError, "warmup_epochs must be less than the 30 epochs, got 30"),
        ({"batch_size": 7}, ValueError, "batch_size must be even for mixup, got 7"),
        ({"reprob": 1.5}, ValueError, "reprob must be less than or equal to 1, got 1.5"),
        ({"amp": "int8"}, ValueError, "amp must be 'bfloat16', 'float16' or 'none', got 'int8'"),
        ({"bce": 1}, TypeError, "bce must be a valid boolean, got 1"),
        ({"mean": 0.5}, TypeError, "mean must be a valid tuple, got 0.5"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(options, kind, text) -> None:
    with pytest.raises(kind, match=text.replace(".", r"\.")):
        Settings(**options)


def test_another_run_in_the_folder_is_not_touched(made, tmp_path) -> None:
    checkpoint, masks_file, _, images = made
    out = tmp_path / "run"
    first = dimap.finetune(checkpoint, images, masks_file, out=out, **QUICK)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(FileExistsError, match="--resume continues and --force replaces"):
        dimap.finetune(checkpoint, images, masks_file, out=out, **QUICK)
    for changes, name in (({"lr": 1e-3}, "lr"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"{name} must be what it was to resume"):
            dimap.finetune(
                checkpoint, images, masks_file, out=out, resume=True, **{**QUICK, **changes}
            )
    with pytest.raises(ValueError, match="masks must be what it was to resume"):
        dimap.finetune(checkpoint, images, {}, out=out, resume=True, **QUICK)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    (out / "state.pt").write_bytes(before["state.pt"][:1000])
    with pytest.raises(ValueError, match="must be the complete state of a run"):
        dimap.finetune(checkpoint, images, masks_file, out=out, resume=True, **QUICK)
    forced = dimap.finetune(checkpoint, images, masks_file, out=out, force=True, **QUICK)
    assert tensors_equal(forced.history, first.history)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_done(made, tmp_path) -> None:
    checkpoint, masks_file, masks, images = made
    with pytest.raises(FloatingPointError, match="the loss must be finite, got nan in epoch"):
        dimap.finetune(
            checkpoint, images, masks_file, out=tmp_path / "run", opt="sgd",
            **{**QUICK, "lr": 1e30, "warmup_lr": 1e30, "clip_grad": 0.0, "epochs": 3},
        )  # fmt: skip
    assert_zero(tmp_path / "run" / "best.safetensors", masks)
    assert (tmp_path / "run" / "state.pt").exists()

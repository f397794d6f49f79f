"""`dimap bench`: every job is timed, on random weights and on a user's own."""

from __future__ import annotations

import json

import pytest
import torch
from commands import runner
from dimap.bench import bench, plain
from dimap.bench.run import QUICK_WEIGHTS, Problem, _part
from dimap.bench.timing import Timing, time_in_turns
from safetensors.torch import save_file

JOBS = ["copy", "score", "select", "prune_", "plain score", "plain select", "torch prune"]


def checkpoint(path, dtype=torch.float32):
    vit = pytest.importorskip("timm.models.vision_transformer")
    model = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    save_file({name: p.to(dtype) for name, p in model.state_dict().items()}, path)
    return model


def test_a_checkpoint_of_ones_own(tmp_path):
    model = checkpoint(tmp_path / "m.safetensors", torch.bfloat16)
    found = bench(str(tmp_path / "m.safetensors"), rounds=3, threads=1)
    assert [row.job for row in found.rows] == JOBS
    assert (found.dtype, found.tensors, found.machine["threads"]) == ("bfloat16", 8, 1)
    weights = sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim > 1
    )
    for row in found.rows:
        assert row.weights == weights
        assert row.nbytes == 2 * weights
        assert len(row.timing.seconds) == (1 if " " in row.job else 3)
        assert row.nanoseconds > 0
    assert {row.job for row in found.rows if row.faster is not None} == {"score", "select"}


def test_threads_are_put_back(threads, tmp_path):
    checkpoint(tmp_path / "m.safetensors")
    threads(2)
    bench(str(tmp_path / "m.safetensors"), rounds=1, threads=1)
    assert torch.get_num_threads() == 2


def test_quick_times_plain_pytorch_on_a_part():
    weights = [torch.rand(1_000_000) for _ in range(7)]
    problem = Problem(weights, list(range(7)), [0, 1] * 3 + [0], [1_000_000, 600_000])
    part = _part(problem, QUICK_WEIGHTS)
    assert (len(part.weights), part.keep) == (4, [500_000, 400_000])
    masks = plain.select(part.weights, part.modules, part.keep)
    assert sum(int(mask.sum()) for mask in masks[::2]) == pytest.approx(500_000, abs=9)


def test_turns_and_faults():
    order = []
    jobs = {"a": lambda: order.append("a"), "b": lambda: torch.ones(1 << 22)}
    prepare = {"a": lambda: order.append("before")}
    told = []
    timings = time_in_turns(jobs, {"a": 2, "b": 2}, prepare, advance=told.append)
    assert order == ["before", "a"] * 3  # one to warm up
    assert [len(t.seconds) for t in timings.values()] == [2, 2]
    assert sum(told) == 6
    assert Timing([1.0, 2.0, 4.0]).beside(Timing([1.0, 1.0, 1.0])) == (2.0, 1.0, 4.0)
    assert Timing([3.0]).beside(Timing([1.0, 2.0])) == (2.0, 2.0, 2.0)


def test_the_command(tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    run = runner(capsys)
    code, out, err = run("bench", "m.safetensors", "--quick", "--plot", "times.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "times.png").stat().st_size > 5_000
    assert all(job in out for job in JOBS)
    assert "…" not in out
    code, out, _ = run("bench", "m.safetensors", "--rounds", 2, "--json", "--dtype", "float16")
    found = json.loads(out)
    assert (code, found["dtype"], len(found["rows"])) == (0, "float16", 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["--device", "cuda"], "device 'cuda' needs a GPU, and torch sees none"),
        (["--plot", "times.txt"], "must end in .png or .svg"),
        (["timm:resnet18"], "must be of a known family"),
    ],
)
def test_what_is_refused(arguments, words, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    code, out, err = runner(capsys)("bench", *arguments)
    assert (code, out) == (1, "")
    assert words in " ".join(err.split())

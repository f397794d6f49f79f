"""One checkpoint pruned by several processes: bit by bit what one makes of it, or an error in all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from contextlib import ExitStack, contextmanager

import forked
import pytest
import torch
import torch.distributed as dist
from checkpoints import CASES, DTYPES, shards, vit
from dimap import cli
from dimap.checkpoint import prune, streaming
from dimap.distributed.group import Group as Ranks
from dimap.distributed.launch import launched
from dimap.stream import prune_checkpoint, pruning_checkpoint
from ranks import Group, environment, free_port, start
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)

IN, OUT, ONE = "in.safetensors", "out.safetensors", "one.safetensors"


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.large), 3], ids=["2 ranks", "3 ranks"]
)
def group(request):
    group = Group(request.param)
    yield group
    group.close()


def content(path):
    """Bytes by name, of a file or of all files in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def nothing_but(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# What the ranks run


def prune_each(jobs):
    """prune_checkpoint(*args, **options) for every job."""
    return [prune_checkpoint(*args, **options, group=dist.group.WORLD) for args, options in jobs]


def prune_with_settings_of_the_rank(source, out, settings):
    prune_checkpoint(source, out, settings[dist.get_rank()], group=dist.group.WORLD)


def prune_with_little_room(source, out):
    """On one rank nothing may be set aside: what lies in the windows is then read again by all."""
    before = streaming.ASIDE
    streaming.ASIDE = 0 if dist.get_rank() == 1 else before
    try:
        return prune_each([((source, out, 0.55), {})])[0].readings
    finally:
        streaming.ASIDE = before


def prune_on_a_full_disk(source, out, rank):
    """The others come late to open what the rank has failed to write by then."""
    before = streaming.opened

    @contextmanager
    def full(paths, flags):
        with before(paths, flags) as files:
            if flags == os.O_RDWR:
                raise OSError(28, "No space left on device", files[0][1])
            yield files

    def late(paths, flags):
        if flags == os.O_RDWR:
            time.sleep(0.2)
        return before(paths, flags)

    streaming.opened = full if dist.get_rank() == rank else late
    try:
        prune_each([((source, out, 0.55), {})])
    finally:
        streaming.opened = before


def fail_when_all_is_written(source, out, rank):
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks([dist.group.WORLD]))
        stack.enter_context(pruning_checkpoint(source, out, 0.5, group=ranks))
        if dist.get_rank() == rank:
            raise ValueError("the report cannot be written")


def exchange():
    """sum and gather, of values of different lengths; the inputs stay as they are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    table = torch.full((2, 3), rank + 1, dtype=torch.int64)
    with Ranks([dist.group.WORLD]) as ranks:
        assert (ranks.rank, ranks.size) == (rank, size)
        assert ranks.sum(table).unique().tolist() == [size * (size + 1) // 2]
        assert ranks.gather("x" * rank * 1000) == ["x" * r * 1000 for r in range(size)]
        numbers = array("q", [rank, -5])
        ranks.exchange(memoryview(numbers))
        assert list(numbers) == [size * (size - 1) // 2, -5 * size]
    assert table.unique().tolist() == [rank + 1]


def take_items(items):
    with Ranks([dist.group.WORLD]) as ranks:
        return [list(ranks.take(items)), list(ranks.take(items[:1]))]


def exchange_from_c():
    """What C++ is given: an error in one rank ends the call in all."""
    with Ranks([dist.group.WORLD]) as ranks:
        if ranks.rank == 0:
            raise ValueError("no more")
        ranks.exchange(memoryview(array("q", [1])))


# Bit-identical


def test_exchange(group):
    group(exchange)


def test_ranks_share_a_list_and_take_each_item_once(group):
    items = [f"{i}.pth" for i in range(100)]
    first, second = zip(*group(take_items, items), strict=True)
    assert sorted(item for mine in first for item in mine) == sorted(items)
    assert [item for mine in second for item in mine] == items[:1]


def test_an_exchange_of_numbers_ends_with_the_error_of_another_rank(group):
    stopped(group.outcomes(exchange_from_c), 0, "ValueError", "no more")


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
def test_bit_identical_to_one_process(group, tmp_path, form, step):
    jobs, wanted = [], {}
    end = "" if form == "folder" else ".safetensors"
    for dtype in DTYPES.values():
        state = vit(dtype, step=step)
        source = tmp_path / f"in {dtype}{end}"
        shards(source, state) if form == "folder" else save_file(state, source)
        for number, (sparsity, options) in enumerate(CASES):
            name = f"{dtype} {number}"
            options = {**options, "masks": tmp_path / f"{name}.masks"}
            one = prune_checkpoint(source, tmp_path / f"{name} one{end}", sparsity, **options)
            wanted[name] = one, options["masks"].read_bytes()
            jobs.append(((source, tmp_path / f"{name}{end}", sparsity), {**options, "force": True}))
    for results in group(prune_each, jobs):
        for result, (one, _) in zip(results, wanted.values(), strict=True):
            assert repr(result.thresholds) == repr(one.thresholds)
            assert (result.kept, result.nonzero) == (one.kept, one.nonzero)
            assert result.smallest == one.smallest
    for name, (_, masks) in wanted.items():
        assert (tmp_path / f"{name}.masks").read_bytes() == masks
        got, want = content(tmp_path / f"{name}{end}"), content(tmp_path / f"{name} one{end}")
        assert list(got.values()) == list(want.values())


BUDGETS = [
    {"params": 0.6, "min_keep": 0.49},
    {"params": 0.6, "sparsity": "auto", "masks": True},
    {"sparsity": 0.5, "scope": "global", "limits": {"mlp": (0.3, 0.4), "blocks.0.*": (0.6, 1)}},
    {"size": 42_000, "format": "bitmask", "sparsity": {"qkv": 0.2}},
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_budgets_and_limits_are_those_of_one_process(group, tmp_path, dtype):
    source = shards(tmp_path / "in", vit(dtype, step=0.01))
    jobs = []
    for number, options in enumerate(BUDGETS):
        if dtype == torch.float32 and "size" in options:
            options = options | {"size": 72_000}
        one, out = options.copy(), options.copy()
        for name, given in (("one", one), ("out", out)):
            if "masks" in given:
                given["masks"] = tmp_path / f"{name} {number}.masks"
        prune_checkpoint(source, tmp_path / f"one {number}", **one)
        jobs.append(((source, tmp_path / f"out {number}"), out))
    for result in group(prune_each, jobs)[0]:
        assert result.report().asked
    for number, options in enumerate(BUDGETS):
        assert content(tmp_path / f"out {number}") == content(tmp_path / f"one {number}")
        if "masks" in options:
            masks = [(tmp_path / f"{name} {number}.masks").read_bytes() for name in ("one", "out")]
            assert masks[0] == masks[1]


def check(group, source, out, sparsity=0.55, **options):
    one_out = out.with_name(f"one{out.suffix}")
    one = prune_checkpoint(source, one_out, sparsity)
    results = group(prune_each, [((source, out, sparsity), {})], *options.values())
    assert list(content(out).values()) == list(content(one_out).values())
    assert all(result[0].kept == one.kept for result in results)


def test_uneven_shards(group, tmp_path):
    state = vit(torch.bfloat16, step=0.01, blocks=4)
    source = shards(tmp_path / "in", state, count=9)
    assert len({len(data) for data in content(source).values()}) > 6
    check(group, source, tmp_path / "out")


def test_a_rank_with_nothing_that_is_pruned(group, tmp_path):
    state = vit(step=0.01) | {"head.weight": torch.ones(7000, 32)}  # more than all of the rest
    order = [name for name in state if name != "head.weight"] + ["head.weight"]
    source = shards(tmp_path / "in", {name: state[name] for name in order}, count=1)
    check(group, source, tmp_path / "out")


def test_experts_in_one_tensor(group, tmp_path):
    """Each expert of a stacked tensor is a layer of its own."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i in range(2):
        block = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{block}self_attn.{name}.weight"] = torch.randn(16, 16, generator=generator)
        state[f"{block}mlp.gate.weight"] = torch.randn(4, 16, generator=generator)
        for name, shape in (("gate_up_proj", (4, 64, 16)), ("down_proj", (4, 16, 32))):
            state[f"{block}mlp.experts.{name}"] = torch.randn(shape, generator=generator)
    state["model.embed_tokens.weight"] = torch.randn(40, 16, generator=generator)
    save_file({name: w.bfloat16() for name, w in state.items()}, tmp_path / "in.safetensors")
    check(group, tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_rank_with_nothing_at_all(group, tmp_path):
    save_file(vit(width=4), tmp_path / IN)
    check(group, tmp_path / IN, tmp_path / OUT)


def test_a_rank_without_room_makes_all_read_again(group, tmp_path):
    save_file(vit(), tmp_path / IN)
    prune_checkpoint(tmp_path / IN, tmp_path / ONE, 0.55)
    readings = group(prune_with_little_room, tmp_path / IN, tmp_path / OUT)
    assert len(set(readings)) == 1
    assert readings[0] > 1
    assert (tmp_path / OUT).read_bytes() == (tmp_path / ONE).read_bytes()


# An error in one rank


def stopped(outcomes, rank, kind, message):
    """That rank raised the error, and every other one said so."""
    for r, (name, text) in enumerate(outcomes):
        assert text is not None, f"rank {r} raised nothing"
        assert message in text.split("\n")[0]
        assert name == (kind if r == rank else "RuntimeError")
        assert r == rank or text.startswith(f"rank {rank} of {len(outcomes)} stopped: ")


def test_a_weight_that_is_not_finite_stops_all(group, tmp_path):
    state = vit()
    state["blocks.1.mlp.fc2.weight"][5, 100] = float("nan")  # in the last rank's part
    save_file(state, tmp_path / IN)
    outcomes = group.outcomes(prune_each, [((tmp_path / IN, tmp_path / OUT, 0.5), {})])
    message = "blocks.1.mlp.fc2.weight must be finite, got nan at flat index 740"
    stopped(outcomes, group.size - 1, "ValueError", message)
    nothing_but(tmp_path, IN)


def test_a_taken_output_stops_all(group, tmp_path):
    save_file(vit(), tmp_path / IN)
    (tmp_path / OUT).write_text("mine")
    outcomes = group.outcomes(prune_each, [((tmp_path / IN, tmp_path / OUT, 0.5), {})])
    stopped(outcomes, 0, "FileExistsError", "exists already")
    assert (tmp_path / OUT).read_text() == "mine"
    nothing_but(tmp_path, IN, OUT)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all(group, tmp_path, rank):
    source = shards(tmp_path / "in", vit())
    outcomes = group.outcomes(prune_on_a_full_disk, source, tmp_path / "out", rank)
    stopped(outcomes, rank, "OSError", "No space left on device")
    nothing_but(tmp_path, "in")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_after_all_was_written_leaves_no_output(group, tmp_path, rank):
    save_file(vit(), tmp_path / IN)
    outcomes = group.outcomes(fail_when_all_is_written, tmp_path / IN, tmp_path / OUT, rank)
    stopped(outcomes, rank, "ValueError", "the report cannot be written")
    nothing_but(tmp_path, IN)


def test_ranks_with_other_settings(group, tmp_path):
    save_file(vit(), tmp_path / IN)
    outcomes = group.outcomes(
        prune_with_settings_of_the_rank, tmp_path / IN, tmp_path / OUT, [0.5, 0.6, 0.5]
    )
    for name, text in outcomes:
        assert name == "ValueError"
        assert "same checkpoint and settings, got others on rank 1 than on rank 0" in text
    nothing_but(tmp_path, IN)


def prune_as_the_model_of_the_rank(source, out):
    model = "timm:vit_tiny_patch16_224" if dist.get_rank() == 1 else None
    prune_checkpoint(source, out, 0.5, model=model, input_size=32 if model else None,
                     group=dist.group.WORLD)  # fmt: skip


def test_ranks_with_another_model_in_the_header(group, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    save_file(model.state_dict(), tmp_path / IN)
    for _, text in group.outcomes(prune_as_the_model_of_the_rank, tmp_path / IN, tmp_path / OUT):
        assert "same checkpoint and settings, got others on rank 1 than on rank 0" in text
    nothing_but(tmp_path, IN)


# A rank that is gone; the command


def run_command(folder, rank, port, timeout, gone, when, number, full=None):
    """`dimap prune`, without torchrun; the rank that goes does it in the middle of the work.

    full: a rank whose disk is full.
    """
    os.environ.update(environment(rank, 3, port) | {"DIMAP_RANK_TIMEOUT": str(timeout)})
    os.chdir(folder)
    os.dup2(os.open(f"error {rank}", os.O_CREAT | os.O_WRONLY), 2)
    module, function = {
        "surveying": (prune, "check_agreement"), "writing": (streaming, "place_of"),
    }[when]  # fmt: skip
    before = getattr(module, function)

    def go(*args):
        found = before(*args)
        os.kill(os.getpid(), number)
        return found

    def stop(*args):
        raise OSError(28, "No space left on device", OUT)

    if rank in (gone, full):
        setattr(module, function, go if rank == gone else stop)
    arguments = ["prune", IN, OUT, "-s", "0.5", "--report", "report.json"]
    cli.app(arguments)


@pytest.mark.parametrize(
    ("gone", "when", "number"),
    [(0, "writing", signal.SIGKILL), (2, "surveying", signal.SIGKILL), (1, "writing", signal.SIGSTOP)],
    ids=["first rank killed", "last rank killed", "a rank hangs"],
)  # fmt: skip
def test_a_rank_that_is_gone_stops_the_others(tmp_path, gone, when, number):
    save_file(vit(), tmp_path / IN)
    port, timeout = free_port(), 4 if number == signal.SIGSTOP else 300
    processes = [
        start(run_command, tmp_path, rank, port, timeout, gone, when, number) for rank in range(3)
    ]
    try:
        for rank, process in enumerate(processes):
            if rank != gone:
                process.join(60)
                assert process.exitcode == 1
                error = (tmp_path / f"error {rank}").read_text()
                assert "one of the 3 ranks does not answer" in error
    finally:
        for process in processes:
            process.kill()
            process.join()
    nothing_but(tmp_path, IN, "error 0", "error 1", "error 2")


def test_an_error_that_nobody_hears_since_a_rank_is_gone(tmp_path):
    save_file(vit(), tmp_path / IN)
    port, signals = free_port(), (0, "writing", signal.SIGKILL)
    processes = [start(run_command, tmp_path, r, port, 300, *signals, 2) for r in range(3)]
    try:
        for process in processes[1:]:
            process.join(60)
            assert process.exitcode == 1
    finally:
        for process in processes:
            process.kill()
            process.join()
    other, full = [" ".join((tmp_path / f"error {r}").read_text().split()) for r in (1, 2)]
    assert "one of the 3 ranks does not answer" in other
    assert "one of the 3 ranks does not answer" in full
    assert full.endswith("this rank had stopped: out.safetensors: No space left on device")
    nothing_but(tmp_path, IN, "error 0", "error 1", "error 2")


def test_torchrun(tmp_path):
    source = shards(tmp_path / "in", vit(step=0.01))
    options = ["-s", "0.55", "--masks", "masks.safetensors", "--report", "report.json", "--json"]
    command = [forked.python(), "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "dimap", "prune"]
    done = subprocess.run(
        [*command, "in", "out", *options], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"seconds"') == 1  # one rank tells
    prune_checkpoint(source, tmp_path / "one", 0.55, masks=tmp_path / "one masks")
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert (tmp_path / "masks.safetensors").read_bytes() == (tmp_path / "one masks").read_bytes()
    nothing_but(
        tmp_path,
        "in",
        "out",
        "one",
        "masks.safetensors",
        "one masks",
        "report.json",
        "out.recipe.toml",
    )


def test_alone_where_nothing_was_launched():
    for names in ({}, {"WORLD_SIZE": "4"}, environment(0, 1, 1)):
        with launched(names) as ranks:
            assert (ranks.rank, ranks.size) == (0, 1)


def test_a_timeout_that_is_no_number():
    names = {**environment(0, 2, 1), "DIMAP_RANK_TIMEOUT": "soon"}
    message = "DIMAP_RANK_TIMEOUT must be seconds, got 'soon'"
    with pytest.raises(ValueError, match=message), launched(names):
        pass


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.large), 3])
def test_processes_that_hash_strings_otherwise_count_the_same(tmp_path, size):
    """As torchrun's do: what is never pruned must have the same order in all of them."""
    state = vit() | {f"blocks.0.norm{i}.weight": torch.ones(i * 700) for i in range(1, 9)}
    state["relative_position_index"] = torch.ones(70_000, dtype=torch.int64)  # no parameter
    save_file(state, tmp_path / IN)
    port = free_port()
    command = [sys.executable, "-m", "dimap", "prune", IN, OUT, "-s", "0.5", "--report", "r.json"]
    processes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | environment(rank, size, port) | {"PYTHONHASHSEED": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * size
    want = prune_checkpoint(tmp_path / IN, tmp_path / "alone.safetensors", 0.5).report()
    got = json.loads((tmp_path / "r.json").read_text())
    assert [m["nonzero"] for m in got["modules"]] == [m.nonzero for m in want.modules]
    assert (tmp_path / OUT).read_bytes() == (tmp_path / "alone.safetensors").read_bytes()

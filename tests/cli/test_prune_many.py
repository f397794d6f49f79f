"""`dimap prune IN… --out-dir DIR`: many checkpoints, some broken, some done before."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dimap
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("typer")

from checkpoints import load_folder, shards, vit
from dimap.checkpoint import manifest
from dimap.checkpoint.inputs import find_inputs
from dimap.checkpoint.manifest import NAME, Manifest
from dimap.checkpoint.many import Job
from dimap.checkpoint.workers import prune_all
from dimap.cli import app
from safetensors.torch import load_file, save_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and pipes as on Linux")


def pruned(seed, sparsity=0.5):
    state = vit(seed=seed)
    dimap.prune(state, sparsity)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a.safetensors, b.pth and the shards llm/, of seeds 1 to 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    save_file(vit(seed=1), "a.safetensors")
    torch.save({"model": vit(seed=2)}, "b.pth")
    shards(Path("llm"), vit(seed=3))
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Run `dimap prune … --out-dir out -s 0.5 --json`: exit code, the object, stderr."""

    def run(*arguments, options=("-s", "0.5"), code=0):
        command = ["prune", *map(str, arguments), "--out-dir", "out", "--json", *options]
        with pytest.raises(SystemExit) as ended:
            app(command, prog_name="dimap")
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return json.loads(out) if out else None, " ".join(err.split())

    return run


def states(told):
    return {one["out"]: one["state"] for one in told["checkpoints"]}


def inodes(folder="out"):
    return {p: p.stat().st_ino for p in Path(folder).rglob("*") if p.is_file() and p.name != NAME}


def lines():
    return [json.loads(line) for line in Path("out", NAME).read_text().splitlines()]


ALL = ("a.safetensors", "b.pth", "llm")


# What is pruned, and where to


def test_files_and_folders(run):
    told, err = run(*ALL)
    assert err == ""
    assert same(load_file("out/a.safetensors"), pruned(1))
    assert same(torch.load("out/b.pth", weights_only=True)["model"], pruned(2))
    assert same(load_folder(Path("out/llm")), pruned(3))
    assert (told["done"], told["done_before"], told["failed"]) == (3, 0, 0)
    report = dimap.prune(vit(seed=1), 0.5).report()
    first = told["checkpoints"][0]
    assert (first["source"], first["kept"], first["weights"]) == (
        "a.safetensors", report.kept, report.weights,
    )  # fmt: skip
    assert sorted(os.listdir("out")) == sorted([*ALL, NAME])


def test_masks_and_reports_have_folders(run):
    run("a.safetensors", "llm", "--masks", "m", "--report", "r")
    masks = dimap.prune(vit(seed=3), 0.5).masks
    assert same(dimap.load_masks("m/llm.safetensors"), masks)
    assert json.loads(Path("r/a.json").read_text())["schema"] == "dimap.report"
    assert states(run("a.safetensors", "llm", "--masks", "m", "--report", "r")[0]) == {
        "a.safetensors": "done before", "llm": "done before",
    }  # fmt: skip
    os.remove("m/llm.safetensors")
    run("a.safetensors", "llm", "--masks", "m")
    assert same(dimap.load_masks("m/llm.safetensors"), masks)


def test_notes_are_told_and_told_again(run, here, capsys):
    save_file(vit(), here / "llm" / "last.safetensors")
    torch.save({"model": vit(), "ema": vit(seed=2)}, "b.pth")
    for _ in range(2):
        told, _ = run(*ALL)
        assert [one["notes"] for one in told["checkpoints"]] == [
            [],
            ["'ema', a copy of these weights, is given the same masks"],
            ["last.safetensors is kept as it is: its weights are not pruned"],
        ]
    with pytest.raises(SystemExit):
        app(["prune", *ALL, "--out-dir", "out", "-s", "0.5"])
    assert "llm: last.safetensors is kept as it is" in capsys.readouterr().out


def names(*arguments, out="out"):
    return [(i.source, i.name) for i in find_inputs([str(a) for a in arguments], Path(out))]


def test_a_folder_of_checkpoints_is_not_a_checkpoint(here):
    (here / "notes.txt").write_text("no checkpoint")
    (here / ".a.safetensors.01234567.dimap-tmp").write_text("left by a crash")
    (here / "out").mkdir()
    save_file(vit(), here / "out" / "model.safetensors")  # an earlier output
    assert names(here) == [(str(here / name), name) for name in ALL]
    assert names("llm") == [("llm", "llm")]


def test_a_pattern_keeps_the_folders_that_it_matches(here):
    for name in ("x", "y"):
        os.makedirs(f"runs/{name}")
        save_file(vit(), f"runs/{name}/best.safetensors")
    (here / "runs" / "z").mkdir()
    assert names("runs/*/best.*") == [
        (f"runs/{name}/best.safetensors", f"{name}/best.safetensors") for name in ("x", "y")
    ]
    assert [name for _, name in names("runs/**/*.safetensors", out="runs/x")] == [
        "y/best.safetensors"  # its own output folder is left out
    ]
    os.rename("runs/x", "runs/[x]")
    assert names("runs/[x]") == [("runs/[x]/best.safetensors", "best.safetensors")]


def test_a_timm_model_is_named_and_inputs_count_once(here):
    assert names("timm:vit_tiny", "a.safetensors", here / "a.safetensors", "./llm/") == [
        ("timm:vit_tiny", "vit_tiny.safetensors"),
        ("a.safetensors", "a.safetensors"),
        ("./llm/", "llm"),
    ]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["gone.pth"], "gone.pth: No such file"),
        (["a.safetensors", "*.gone"], "*.gone: must match a checkpoint, matches none"),
        (["empty"], "empty: must be a checkpoint (model.safetensors or"),
        (["llm/model-00001-of-00003.safetensors"], "got one of its shards"),
        (["llm/*.safetensors"], "got one of its shards"),
        (["copy/a.safetensors", "a.safetensors"], "'runs/*/best.pth', keeps the folders"),
        (["copy/a.safetensors", "copy/a.pth", "--masks", "m"], "the masks of copy/a.pth must have"),
        (["a.safetensors", "--masks", "out"], "place of its own"),
        (["a.safetensors", "--masks", "llm/m", "llm"], "must lie apart from llm"),
        (["out/old.safetensors"], "must lie apart from out/old.safetensors"),
        (["outlink/old.safetensors"], "must lie apart from outlink/old.safetensors"),
        (["out"], "--out-dir must lie apart from IN"),
    ],
)
def test_refused_before_any_work(run, here, arguments, want):
    (here / "empty").mkdir()
    (here / "copy").mkdir()
    (here / "out").mkdir()
    (here / "outlink").symlink_to(here / "out")
    save_file(vit(), here / "copy" / "a.safetensors")
    torch.save(vit(), here / "copy" / "a.pth")
    save_file(vit(), here / "out" / "old.safetensors")
    before = sorted(here.rglob("*"))
    told, err = run(*arguments, code=1)
    assert told is None
    assert want in err
    assert sorted(here.rglob("*")) == before


def test_out_dir_inside_an_input_is_refused(run, here):
    (here / "llm" / "out").symlink_to(here / "out")
    command = ["prune", "llm", "--out-dir", "llm/more", "-s", "0.5"]
    with pytest.raises(SystemExit) as ended:
        app(command, prog_name="dimap")
    assert ended.value.code == 1
    assert not os.path.exists("llm/more")


@pytest.mark.parametrize(
    ("options", "got"), [(("-s", "1.5"), "1.5"), (("-s", "0.5", "--module", "qkv=nan"), "nan")]
)
def test_a_share_out_of_range(run, options, got):
    _, err = run("a.safetensors", options=options, code=2)
    assert f"must be in [0, 1], got {got}" in err
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    "arguments", [["a.safetensors"], [*ALL], ["a.safetensors", "o.safetensors", "--jobs", "2"],
                  ["a.safetensors", "o.safetensors", "--checksum"],
                  ["a.safetensors", "--out-dir", "out", "--jobs", "0"]],
)  # fmt: skip
def test_usage(here, arguments):
    with pytest.raises(SystemExit) as ended:
        app(["prune", *arguments, "-s", "0.5"], prog_name="dimap")
    assert ended.value.code == 2
    assert sorted(os.listdir()) == sorted(ALL)


# What fails


def test_a_broken_file_is_told_and_the_others_go_on(run, here, capsys):
    (here / "bad.safetensors").write_bytes(b"\xff" * 64)
    torch.save({"a": 1}, here / "empty.pth")
    told, err = run("bad.safetensors", "a.safetensors", "empty.pth", "llm", code=1)
    assert states(told) == {
        "bad.safetensors": "failed", "a.safetensors": "done", "empty.pth": "failed", "llm": "done",
    }  # fmt: skip
    assert err.count("dimap: error:") == 2
    assert "must be a complete safetensors file" in told["checkpoints"][0]["error"]
    assert sorted(os.listdir("out")) == sorted(["a.safetensors", "llm", NAME])
    last = {line["out"]: line for line in lines()}
    assert last["bad.safetensors"]["state"] == "failed"
    assert "safetensors" in last["bad.safetensors"]["error"]
    with pytest.raises(SystemExit):
        app(["prune", "bad.safetensors", "a.safetensors", "--out-dir", "out", "-s", "0.5"])
    table = capsys.readouterr().out
    assert "1 done before, 1 failed" in table
    assert "bad.safetensors" in table


def test_the_disk_is_full_for_one(run, here):
    resource = pytest.importorskip("resource")
    save_file(vit(width=64), here / "large.safetensors")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
    try:
        told, err = run("large.safetensors", "a.safetensors", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert states(told) == {"large.safetensors": "failed", "a.safetensors": "done"}
    assert "File too large" in err
    assert sorted(os.listdir("out")) == ["a.safetensors", NAME]
    assert run("large.safetensors", "a.safetensors")[0]["done"] == 1


def test_input_that_changes_while_it_is_read(run, here, monkeypatch):
    from dimap.checkpoint import many

    original = many.prune_checkpoint

    def changing(*arguments, **options):
        found = original(*arguments, **options)
        os.utime("a.safetensors")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(many, "prune_checkpoint", changing)
        _, err = run("a.safetensors", code=1)
    assert "a.safetensors must not change while it is read" in err
    assert os.listdir("out") == [NAME]
    assert run("a.safetensors")[0]["done"] == 1


# What is done before


def test_the_same_command_does_nothing_again_and_reads_nothing(run, monkeypatch):
    run(*ALL)
    before, size = inodes(), os.path.getsize(f"out/{NAME}")

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(manifest, "_sha256", read)
    told, _ = run(*ALL)
    assert set(states(told).values()) == {"done before"}
    assert told["checkpoints"][0]["kept"] == pruned_kept(1)
    assert inodes() == before
    assert os.path.getsize(f"out/{NAME}") == size
    assert run(*ALL, "--force")[0]["done_before"] == 3  # so that a forced command continues, too


def pruned_kept(seed):
    return dimap.prune(vit(seed=seed), 0.5).report().kept


def test_hashes_are_those_of_the_files(run):
    hashlib = pytest.importorskip("hashlib")
    run("a.safetensors", "llm", "--checksum")
    found = {line["out"]: line for line in lines() if line["state"] == "done"}
    (file,) = found["a.safetensors"]["input"]
    assert file["sha256"] == hashlib.sha256(Path("a.safetensors").read_bytes()).hexdigest()
    for file in found["llm"]["outputs"]["out"]:
        data = Path("out/llm", file["path"]).read_bytes()
        assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert len(found["llm"]["outputs"]["out"]) == len(os.listdir("llm"))


def test_a_touched_file_is_the_same_where_its_checksum_is(run):
    run(*ALL, "--checksum")
    os.utime("a.safetensors")
    os.utime("out/b.pth", (1, 1))
    assert run(*ALL)[0]["done_before"] == 3
    data = Path("out/b.pth").read_bytes()
    Path("out/b.pth").write_bytes(data[:-1] + b"x")
    assert "out/b.pth: is not what was made" in run(*ALL, code=1)[1]


def test_a_touched_file_is_another_without_checksums(run):
    run(*ALL)
    assert {f["sha256"] for line in lines() for f in line.get("input", ())} == {None}
    os.utime("a.safetensors")
    os.utime("out/b.pth", (1, 1))
    told, err = run(*ALL, code=1)
    assert list(states(told).values()) == ["failed", "failed", "done before"]
    assert "was made when a.safetensors was another and is replaced only by force" in err
    assert run(*ALL, "--force")[0]["done"] == 2


def test_a_changed_input_is_told_and_made_again_by_force(run):
    run(*ALL)
    before = inodes()
    save_file(vit(seed=9), "a.safetensors")
    Path("llm/config.json").write_text('{"a": 2}')
    told, err = run(*ALL, code=1)
    assert list(states(told).values()) == ["failed", "done before", "failed"]
    assert "was made when a.safetensors was another and is replaced only by force" in err
    assert inodes() == before
    told, _ = run(*ALL, "--force")
    assert list(states(told).values()) == ["done", "done before", "done"]
    assert same(load_file("out/a.safetensors"), pruned(9))
    assert Path("out/llm/config.json").read_text() == '{"a": 2}'


@pytest.mark.parametrize(
    "options", [["-s", "0.4"], ["-s", "0.5", "--module", "qkv=0.5"], ["-s", "0.5", "--scope", "layer"],
                ["-s", "0.5", "--normalize", "block"]],
)  # fmt: skip
def test_other_settings_are_not_done(run, options):
    run("a.safetensors")
    before = inodes()
    _, err = run("a.safetensors", options=options, code=1)
    assert "was made with other settings" in err
    assert inodes() == before
    assert run("a.safetensors", "--force", options=options)[0]["done"] == 1
    assert run("a.safetensors", options=options)[0]["done_before"] == 1


def test_an_output_that_was_changed_is_kept_and_one_that_was_removed_is_made(run):
    run(*ALL)
    os.remove("out/b.pth")
    save_file(vit(seed=9), "out/a.safetensors")
    Path("out/llm/more").write_text("")
    told, err = run(*ALL, code=1)
    assert list(states(told).values()) == ["failed", "done", "failed"]
    assert "out/a.safetensors: is not what was made" in err
    assert same(load_file("out/a.safetensors"), vit(seed=9))


def test_an_output_of_somebody_else_is_kept(run):
    os.mkdir("out")
    save_file(vit(seed=9), "out/a.safetensors")
    for _ in range(2):  # a failed try gives no right to it
        assert "exists already" in run("a.safetensors", code=1)[1]
    Path("a.safetensors").write_bytes(b"")  # nor does one that is forced
    run("a.safetensors", "--force", code=1)
    save_file(vit(seed=1), "a.safetensors")
    assert "exists already" in run("a.safetensors", code=1)[1]
    assert same(load_file("out/a.safetensors"), vit(seed=9))


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_made_again(run, cut):
    run("a.safetensors", "llm")
    manifest = Path("out", NAME)
    whole = manifest.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    manifest.write_bytes(whole[: start + cut if cut > 0 else cut])
    last = json.loads(whole[start:])["out"]
    told, _ = run("a.safetensors", "llm")
    want = "done" if cut > 0 else "done before"  # but for its end, the line is whole
    assert states(told) == dict.fromkeys(("a.safetensors", "llm"), "done before") | {last: want}
    assert run("a.safetensors", "llm")[0]["done_before"] == 2


def test_a_manifest_of_a_later_version_is_refused(run):
    os.mkdir("out")
    Path("out", NAME).write_text('{"version": 2, "out": "a.safetensors"}\n')
    assert "must be of version 1, got 2" in run("a.safetensors", code=1)[1]


def test_many_processes_append_whole_lines(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dimap.checkpoint.manifest import Manifest\n"
        "for i in range(200): Manifest(Path(sys.argv[1])).append(f'{sys.argv[2]}-{i}', 'begun', x='y' * 3000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / NAME).write_text('{"version": 1, "ou')  # torn: the first of them ends the line
    started = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    found = Manifest(tmp_path).read()
    assert found.keys() == {f"{name}-{i}" for name in "ab" for i in range(200)}


# Crashes

KILLED = """
import os, signal, sys
from dimap import cli
from dimap.checkpoint import manifest
original, calls, moment = manifest.Manifest.append, [], int(sys.argv.pop(1))
def append(self, name, state, **more):
    calls.append(state)
    if len(calls) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, name, state, **more)
manifest.Manifest.append = append
cli.main()
"""


@linux
@pytest.mark.parametrize("moment", [2, 3, 4])
def test_killed_and_continued(run, moment):
    """Killed before a line "begun", or when an output is there but not told done."""
    command = [sys.executable, "-c", KILLED, str(moment), "prune", *ALL]
    ended = subprocess.run([*command, "--out-dir", "out", "-s", "0.5"], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert len([name for name in ALL if os.path.exists(f"out/{name}")]) == moment // 2
    before = inodes()
    done = [line["out"] for line in lines() if line["state"] == "done"]
    told, _ = run(*ALL)
    assert [name for name, state in states(told).items() if state == "done before"] == done
    kept = {p: i for p, i in before.items() if p.parts[1] in done}
    assert kept.items() <= inodes().items()
    assert same(load_file("out/a.safetensors"), pruned(1))
    assert same(load_folder(Path("out/llm")), pruned(3))
    assert sorted(os.listdir("out")) == sorted([*ALL, NAME])


def test_begun_with_other_settings_replaces_nothing(run):
    run("a.safetensors")
    Path("out", NAME).write_text("".join(f"{json.dumps(line)}\n" for line in lines()[:1]))
    shutil.copy("b.pth", "out/a.safetensors")  # anybody's
    told, _ = run("a.safetensors", options=("-s", "0.3"), code=1)
    assert "was begun with other settings and is replaced only by force" in str(told)
    assert Path("out/a.safetensors").read_bytes() == Path("b.pth").read_bytes()
    assert states(run("a.safetensors")[0]) == {"a.safetensors": "done"}  # the same command


@pytest.mark.parametrize("end", ["ctrl-c", "killed"])
def test_ended_while_it_replaces_what_was_done(run, monkeypatch, end):
    """The output is still the one that was done: it is told so, and not made again."""
    run("a.safetensors")
    before = inodes()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dimap.checkpoint.many.prune_checkpoint", interrupted)
        run("a.safetensors", options=("-s", "0.4", "--force"), code=130)
    told = [(line["state"], line["settings"]["sparsity"]) for line in lines()]
    assert told == [("begun", 0.5), ("done", 0.5), ("begun", 0.4), ("done", 0.5)]
    if end == "killed":
        Path("out", NAME).write_text("".join(f"{json.dumps(line)}\n" for line in lines()[:3]))
    error = run("a.safetensors", options=("-s", "0.4"), code=1)[0]
    assert "was made with other settings" in str(error)
    assert states(run("a.safetensors")[0]) == {"a.safetensors": "done before"}
    assert before.items() <= inodes().items()


WAITING = "waiting.safetensors"
HANGS = """
import builtins, os, time
whole = builtins.open
def slow(file, *arguments, **options):
    if str(file).endswith("waiting.safetensors"):
        time.sleep(3600)
    return whole(file, *arguments, **options)
builtins.open = slow
"""


@pytest.fixture
def hangs(here, tmp_path_factory, monkeypatch):
    """Every process that is started hangs where it reads files of this name."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(HANGS)
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), path])))
    save_file(vit(seed=4), WAITING)


def wait_for(condition, process=None, seconds=180):
    """Until the condition holds; not on, where the process that is to bring it about has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def begun(name, folder="out"):
    return lambda: Manifest(Path(folder)).read().get(name, {}).get("state") == "begun"


@linux
def test_several_at_a_time_and_one_process_is_killed(run, hangs):
    """As the system does where memory runs out: it costs one checkpoint."""
    items = find_inputs([WAITING, *ALL], Path("out"))
    os.mkdir("out")
    job = Job(Path("out"), {"sparsity": 0.5, "scope": "module", "normalize": "layer"})

    outcomes = {}
    for outcome in prune_all(job, iter([(item, None) for item in items]), 2):
        outcomes[outcome.source] = outcome
        assert WAITING not in outcomes or len(outcomes) > len(ALL), outcome.error
        if len(outcomes) == len(ALL):  # the other process has nothing left to do
            wait_for(begun(WAITING))
            for process in multiprocessing.active_children():
                process.kill()
    assert "was ended by signal 9, as where memory runs out" in outcomes.pop(WAITING).error
    assert {o.state for o in outcomes.values()} == {"done"}
    assert same(load_file("out/a.safetensors"), pruned(1))
    assert same(load_folder(Path("out/llm")), pruned(3))
    assert states(run(*ALL, "--jobs", 2)[0]) == dict.fromkeys(ALL, "done before")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_no_process_outlives_the_command(hangs, number):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from dimap.cli import main\nif __name__ == '__main__': main()"
    command = [sys.executable, "-c", code, "prune", WAITING, "a.safetensors", "--out-dir", "out"]
    process = subprocess.Popen(
        [*command, "-s", "0.5", "-j", "2"], stderr=subprocess.PIPE, text=True
    )
    wait_for(begun(WAITING), process)
    wait_for(lambda: not begun("a.safetensors")() and Path("out/a.safetensors").exists(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number), err
    assert "Traceback" not in err
    wait_for(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))
    assert sorted(os.listdir("out")) == ["a.safetensors", NAME]


# Shared among ranks


def torchrun(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*command, "-m", "dimap", "prune", *arguments, "--out-dir", "out", "-s", "0.5", "--json"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


@linux
def test_torchrun_shares_the_checkpoints(run, here):
    pytest.importorskip("torch.distributed")
    (here / "bad.safetensors").write_bytes(b"")
    ended = torchrun(*ALL, "bad.safetensors")
    assert ended.returncode != 0  # one failed
    told = json.loads(ended.stdout)  # by rank 0 alone, and of all ranks
    assert states(told) == dict.fromkeys(ALL, "done") | {"bad.safetensors": "failed"}
    found = [line["out"] for line in lines() if line["state"] == "begun"]
    assert sorted(found) == sorted([*ALL, "bad.safetensors"])  # each by one rank
    assert same(load_folder(Path("out/llm")), pruned(3))
    assert run(*ALL)[0]["done_before"] == 3


@linux
def test_a_rank_that_dies_ends_the_others(here, hangs):
    save_file(vit(seed=4), "more-waiting.safetensors")  # one for each rank

    def kill():
        wait_for(begun(WAITING))
        wait_for(begun("more-waiting.safetensors"))
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                links = [os.readlink(f"/proc/{pid}/cwd")]
            except OSError:
                continue
            if b"RANK=1" in environment and links == [str(here)]:
                os.kill(int(pid), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    ended = torchrun(WAITING, "more-waiting.safetensors")
    killer.join()
    assert ended.returncode != 0
    assert os.listdir("out") == [NAME]

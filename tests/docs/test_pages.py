"""What the pages tell a reader to type is typed here, page by page, in a folder of small files of those names.

Blocks of a page share their folder, and Python blocks their names. A block below `<!-- not run: why -->` is
skipped for that reason. That links lead somewhere is checked by `make docs`.
"""

from __future__ import annotations

import linecache
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dimap
import forked
import pytest
import torch
from checkpoints import shards, vit

timm = pytest.importorskip("timm")
pytest.importorskip("matplotlib")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "examples/demo/README.md", "experiments/paper/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$", re.M
)
# Lines of a shell block that are run by others, or fetch something.
ELSEWHERE = re.compile(r"(make \w|pip (install|download) |python -m pip )")
SMALL = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 4,
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["text"], m["why"])
        for m in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.language in ("sh", "python")]


def test_every_block_has_a_language_that_is_run_or_shown():
    shown = {"sh", "python", "text", "toml", "bibtex", "{eval-rst}"}
    assert {str(block): block.language for block in BLOCKS if block.language not in shown} == {}


def test_no_commands_hide_in_indented_blocks():
    command = re.compile(r"\n\n {4}(?:\$ )?(?:dimap|python|pip|make|torchrun|import) .*")
    for page in PAGES:
        outside = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
        assert command.findall(outside) == [], page


def fashion(folder: Path) -> None:
    """Four files of Fashion-MNIST's names, with 128 and 12 images of noise."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 128), ("t10k", 12)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        head = struct.pack(">II", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.numpy().tobytes())


def fill(folder: Path) -> None:
    """The files that the pages speak of, small."""
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples/demo/swin_fashion.safetensors", folder / "model.safetensors")
    state = vit()
    for name in ("swin-folder", "huge-folder", "llm-folder", "in-folder"):
        shards(folder / name, state)
    for name in ("checkpoints/a", "checkpoints/b", "runs/a", "runs/a/best", "runs/b/best"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(state, path)
        torch.save(state, path.with_suffix(".pth"))
    fashion(folder / "data/FashionMNIST/raw")
    bin = folder / "bin"
    bin.mkdir()
    # Pretrained weights are not downloaded: timm's models come with fresh ones.
    for name, run in {
        "dimap": '-m dimap "$@" $(case "$*" in *timm:*) echo --random-init;; esac)',
        "torchrun": '-m torch.distributed.run "$@"',
        "python": '"$@"',
    }.items():
        (bin / name).write_text(f"#!/bin/bash\nexec {forked.python()} {run}\n")
        (bin / name).chmod(0o755)


def trainers() -> dict[str, Any]:
    """A small model and data for the Trainer of Transformers, and for Lightning's."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    lightning = pytest.importorskip("lightning.pytorch")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.models.VisionTransformer(**SMALL)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    ids = torch.arange(8)
    return {
        "model": transformers.LlamaForCausalLM(config),
        "data": [{"input_ids": ids, "labels": ids}] * 8,
        "module": Module(),
    }


def given(page: str) -> dict[str, Any]:
    """What Python blocks use and do not make: a model, its data, an optimizer."""
    model = timm.models.VisionTransformer(**SMALL)
    images = [(torch.randn(3, 32, 32), label) for label in range(4)]
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    own = trainers() if page == "docs/integrations.md" else {}
    return {
        "dimap": dimap,
        "torch": torch,
        "model": model,
        "batches": list(loader),
        "loader": loader,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "train": lambda model, optimizer: optimizer.step(),
        **own,
    }


class Reader:
    """Types the blocks of one page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] | None = None
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        self.failed: Block | None = None

    def sh(self, block: Block) -> None:
        lines = block.text.splitlines(keepends=True)
        text = "".join(line for line in lines if not ELSEWHERE.match(line))
        command = ["bash", "-euo", "pipefail", "-c", text]
        ran = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr}"

    def python(self, block: Block) -> None:
        if self.names is None:
            self.names = given(block.page)
        text = "\n" * (block.line - 1) + block.text
        linecache.cache[str(block)] = (len(text), None, text.splitlines(keepends=True), str(block))
        exec(compile(text, str(block), "exec"), self.names)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    """Page -> its reader; what pages change in this process is put back."""
    found: dict[str, Reader] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k | {"pretrained": False}))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        here = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        for page in dict.fromkeys(block.page for block in RUN):
            folder = tmp_path_factory.mktemp("page")
            fill(folder)
            found[page] = Reader(folder)
        for name, value in here.items():
            patch.setenv(name, value)  # a group of one process, where a page makes one
        yield found
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", RUN, ids=str)
def test_what_a_page_says_runs(
    block: Block, readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.why:
        pytest.skip(block.why)
    reader = readers[block.page]
    if reader.failed:
        pytest.fail(f"{reader.failed} failed before it")
    monkeypatch.chdir(reader.folder)
    reader.failed = block
    getattr(reader, block.language)(block)
    reader.failed = None


def test_every_operator_is_on_its_page():
    schemas = (ROOT / "csrc/schema.cpp").read_text(encoding="utf-8")
    page = (ROOT / "docs/operators.md").read_text(encoding="utf-8")
    names = re.findall(r'"([a-z_.]+)\(', schemas)
    assert {"score", "score.out", "unpack"} <= set(names)
    assert [name for name in names if not re.search(rf"`{re.escape(name)}[(`]", page)] == []
    assert set(dimap.ops.__all__) == {name for name in names if "." not in name} | {"first_windows"}


def test_every_public_name_is_in_the_reference():
    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/api").glob("*.md"))
    modules = {"ops"}  # docs/operators.md
    names = set(dimap.__all__) - modules - {"__version__"}
    assert [n for n in sorted(names) if not re.search(rf":: dimap\.{n}\n", pages)] == []


def test_tables_are_those_of_the_results():
    import table

    for page, makers in table.TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [m for m, make in makers.items() if make() not in text] == [], page

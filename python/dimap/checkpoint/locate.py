"""What a path is, by its content: which files are weights, in which form, and what is none of them."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .._files import check_readable, naming
from .header import MOST, unique

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".th")  # endings of files of torch.save
SAFETENSORS, TORCH = "safetensors", "torch.save"  # the forms that are read
_SCRIPT = "a TorchScript archive: save torch.jit.load(file).state_dict() by torch.save"
_FORMS = (SAFETENSORS, TORCH, _SCRIPT, "a GGUF file", "an HDF5 file", "an ONNX file")
LEFT_OUT = (".git", ".cache", ".huggingface")  # of a folder: what holds old copies, or none of it

# Files that libraries write for weights, in the order in which they are looked for.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model", "adapter_model")
_INDEX = re.compile(r"(.+\.(?:safetensors|bin))\.index(?:\.[\w-]+)?\.json")
_SHARD = re.compile(r".+-\d{5}-of-(\d{5})\.\w+")  # model-00001-of-00003.safetensors
_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*|random_states.*)\.\w+")
_OTHER = (".h5", ".msgpack", ".gguf", ".onnx", ".tflite", ".ot", ".pdparams", ".npz", ".keras")

_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which torch < 1.6 begins
_MAGIC = (
    (0, b"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches what it stands for"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (257, b"ustar", "a tar archive: unpack it first"),
)


def form_of(path: Path) -> str:
    """`SAFETENSORS` or `TORCH`, or what else the file is, in words.

    Told by its first bytes; by its ending where these say nothing, as of an empty or damaged file.
    """
    with naming(path), open(path, "rb") as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if 2 <= length <= MOST and head[8:9] == b"{":
        return SAFETENSORS
    if head[:4] == b"PK\x03\x04":
        return _form_of_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return TORCH if _LEGACY in head[:40] else "a pickle that torch.save did not write"
    for at, magic, name in _MAGIC:
        if head[at : at + len(magic)] == magic:
            return name
    # An ONNX file begins with its version, then the next field: who made it, or the graph.
    if len(head) > 16 and head[0] == 8 and head[1] < 32 and head[2] in b"\x12\x1a\x22\x3a\x42":
        return "an ONNX file"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "a web page"
    ending = path.suffix.lower()
    return SAFETENSORS if ending == ".safetensors" else TORCH if ending in PICKLED else "neither"


def _form_of_zip(path: Path) -> str:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return TORCH  # a part of one: reading it says so
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return _SCRIPT
    if "data.pkl" in inside:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive"
    return "a zip archive of another kind"


class Index(NamedTuple):
    """Which tensor is in which file of a folder.

    text: the file at `path`. weight_map: tensor name -> name of a file beside it.
    """

    path: Path
    text: bytes
    weight_map: dict[str, str]

    @staticmethod
    def read(path: Path, text: bytes) -> Index:
        """The index of this text. Raises ValueError."""
        try:
            index = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be JSON ({error})") from error
        weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} must have a weight_map from tensor names to file names")
        ending = ".bin" if ".bin.index" in path.name else ".safetensors"
        for file in weight_map.values():
            # Nothing but a plain name: the output must not be written outside its folder.
            plain = isinstance(file, str) and Path(file).name == file
            if not plain or not file.endswith(ending):
                raise ValueError(f"{path} must name {ending[1:]} files beside it, got {file!r}")
        return Index(path, text, weight_map)

    def check(self, home: Mapping[str, Path]) -> None:
        """It must say of every tensor in which file it is. Raises ValueError."""
        for name, file in self.weight_map.items():
            if name not in home or home[name].name != file:
                raise ValueError(f"{self.path} must match its shards, got {name}, not in {file}")
        for name, path in home.items():
            if name not in self.weight_map:
                raise ValueError(
                    f"{self.path} must name every tensor of its shards, got no {name}, "
                    f"which is in {path.name}"
                )


class Weights(NamedTuple):
    """The files of a checkpoint, all of one form: `SAFETENSORS` or `TORCH`; and what lists them."""

    files: list[Path]
    form: str
    listing: Index | None


def find_weights(path: Path, *, alone: bool = False) -> Weights:
    """The weights at a path: a file, or a folder's. alone: one of several shards will do.

    Raises OSError for what cannot be read or is not there, ValueError for what is no checkpoint, or
    one of a checkpoint's shards: these are not pruned apart from each other.
    """
    check_readable(path)
    chosen, index = choose_weights(path) if path.is_dir() else path, None
    files = [chosen]
    if _INDEX.fullmatch(chosen.name):
        if not path.is_dir():
            raise ValueError(
                f"{path} must be weights, got their index: give the folder {path.parent}"
            )
        if (form := form_of(chosen)) != "neither":
            raise ValueError(f"{chosen} must be an index of weights, got {form}")
        index = Index.read(chosen, chosen.read_bytes())
        files = [chosen.parent / name for name in sorted(set(index.weight_map.values()))]
    elif not path.is_dir() and not alone:
        check_no_shard(path)
    forms = set()
    for file in files:
        if index and not os.path.lexists(file):
            problem = f"must be there, since {chosen} names it: download it again"
            raise FileNotFoundError(errno.ENOENT, problem, str(file))
        check_readable(file)
        form = form_of(file)
        if form not in (SAFETENSORS, TORCH):
            got = "a file of another kind" if form == "neither" else form
            raise ValueError(
                f"{file} must be a safetensors file or a file of torch.save, got {got}"
            )
        forms.add(form)
    if len(forms) > 1:
        raise ValueError(f"{chosen} must name files of one form, got {' and '.join(sorted(forms))}")
    return Weights(files, form, index)


def choose_weights(folder: Path) -> Path:
    """The file of a folder, or the index, by which its weights are loaded."""
    names = sorted(child.name for child in folder.iterdir())
    known = known_weights(names)
    if known is not None:
        return folder / known
    ends = (".safetensors", *PICKLED)
    indexes = [name for name in names if _INDEX.fullmatch(name)]
    lone = [n for n in names if n.endswith(ends) and not _SHARD.fullmatch(n)]
    candidates = indexes or [n for n in lone if not _STATE.fullmatch(n)]
    if len(candidates) == 1:
        return folder / candidates[0]
    if candidates:
        raise ValueError(
            f"{folder} must hold one set of weights, got {shorten(candidates)}: give the file, or "
            f"call the one that is meant {SINGLE}"
        )
    below = [
        p.name for p in sorted(folder.iterdir()) if p.is_dir() and known_weights(os.listdir(p))
    ]
    hint = f"; give one of its folders: {shorten(below)}" if below else ""
    if any(map(_SHARD.fullmatch, names)):
        hint = (
            "; these are shards without the index that says which tensor is in which: download that, "
            "too, or save the model again by save_pretrained"
        )
    raise FileNotFoundError(
        errno.ENOENT,
        f"must hold {SINGLE} or {INDEX}, or one other .safetensors or .bin file or its index, "
        f"got {shorten(names) or 'an empty folder'}{hint}",
        str(folder),
    )


def known_weights(names: Iterable[str]) -> str | None:
    """Which of the names in a folder is the one that libraries load: weights, or their index."""
    ranked = []
    for name in names:
        index = _INDEX.fullmatch(name)
        stem, _, rest = (index[1] if index else name).partition(".")
        variant, _, ending = rest.rpartition(".")
        if stem in STEMS and ending in ("safetensors", "bin"):
            # safetensors first, the whole before a variant as "fp16", a file before an index.
            ranked.append((ending == "bin", bool(variant), STEMS.index(stem), bool(index), name))
    return min(ranked)[-1] if ranked else None


def other_weights(folder: Path, files: Iterable[Path]) -> list[str]:
    """What else in a folder holds weights, below it too, that are not those of `files`."""
    found, mine = [], {file.name for file in files}
    for home, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if f not in LEFT_OUT)
        if os.path.realpath(home) in map(os.path.realpath, Path(home).parents):
            folders[:] = []  # a link that leads back
            continue
        for name in sorted(names):
            path = Path(home, name)
            if home == str(folder) and name in mine:
                continue
            if path.suffix.lower() in _OTHER or holds_weights(path):
                found.append(path.relative_to(folder).as_posix())
    return found


def holds_weights(path: Path) -> bool:
    """Whether a file holds weights in a form that is known, if only to be named."""
    try:
        return path.is_file() and not _STATE.fullmatch(path.name) and form_of(path) in _FORMS
    except OSError:
        return False


def check_no_shard(path: Path) -> None:
    """A shard alone has thresholds of its own: its weights would not be what is kept of the whole."""
    shard = _SHARD.fullmatch(path.name)
    named = bool(shard and int(shard[1]) > 1)
    for index in path.parent.glob("*.index*.json") if not named else ():
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
            named |= path.name in weight_map.values() and len(set(weight_map.values())) > 1
    if named:
        raise ValueError(
            f"{path} must be a whole checkpoint, got one of its shards; give the folder "
            f"{path.parent} with {INDEX}"
        )


def shorten(items: Iterable[str], most: int = 8) -> str:
    """The first few of many names, for an error message."""
    texts = list(items)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")

"""Files: safetensors opened with clear errors, and outputs that appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# An output that was interrupted by kill -9 or a power cut is found under a name of this form:
# ".NAME.RANDOM.dimap-tmp", and the next output of that name removes it. Everything else that ends a
# program removes it at once.
SUFFIX = ".dimap-tmp"
LONGEST = 255 - len(f"..01234567{SUFFIX}")  # bytes of a NAME; a longer one is a hash of it


@contextmanager
def replacing(path: Path, *, folder: bool = False, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file (or folder) beside `path`, and rename it when the block ends.

    Where the block fails or is interrupted the temporary is removed and `path` is as it was; errors
    that name the temporary, or nothing, name `path`. A symbolic link at `path` is replaced, not
    written through. A file is replaced in one step; of a folder that is there already, the old one
    is moved aside first and removed last.

    Raises:
        FileExistsError: `path` is there and not `force`, or is a device, a pipe or a socket.
        OSError: `path` cannot be created, or is a folder where a file is wanted, or the reverse.
    """
    check_free(path, folder=folder, force=force)
    remove_leftovers(path)
    temporary = _beside(path)
    lock = None
    try:
        try:
            temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        except OSError as error:
            problem = f"must be in a folder that can be written to, got: {error.strerror}"
            if isinstance(error, FileNotFoundError) and not path.parent.exists():
                problem = f"must be in a folder that exists: make {path.parent} first (mkdir -p)"
            raise OSError(error.errno, problem, str(path)) from error
        lock = _lock(temporary)
        with naming(path, temporary):
            yield temporary
            _sync(temporary)
            check_free(path, folder=folder, force=force)
            if folder and os.path.lexists(path):
                _exchange(temporary, path)
            else:
                os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        remove(temporary)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Give errors of reading or writing that name no file the name of `path`.

    Those that name the temporary, or what is in it, name what the user will find there.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        named = error.filename
        # A copy that cannot be written names where it is read, and this second.
        if error.filename2 is not None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            named = error.filename2
        if named is None:
            found = path
        elif temporary is not None and isinstance(named, (str, os.PathLike)):
            inside = os.path.relpath(named, temporary)
            if inside.split(os.sep)[0] == os.pardir:
                raise
            found = path if inside == os.curdir else path / inside
        else:
            raise
        raise OSError(error.errno, error.strerror, str(found)) from error


def check_free(path: Path, *, folder: bool = False, force: bool = False) -> None:
    """Refuse an output path that is taken, or that is of the wrong kind."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, "must name a file or folder to create", str(path))
    try:
        os.lstat(path)  # an error that the name is too long comes now, not after the work
    except (FileNotFoundError, NotADirectoryError):
        return
    kind, wanted = kind_of(path), "a folder" if folder else "a file"
    if kind in SPECIAL:
        raise FileExistsError(errno.EEXIST, f"must be {wanted}, got {kind}", str(path))
    if (kind == "a folder") != folder:
        code = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(code, f"must be {wanted}, got {kind}", str(path))
    if folder and force and not os.access(path, os.W_OK) and path.stat().st_uid != os.geteuid():
        raise PermissionError(
            errno.EACCES, "must be a folder whose files can be removed to be replaced", str(path)
        )
    if not force:
        raise FileExistsError(
            errno.EEXIST, "exists already and is replaced only by force (--force)", str(path)
        )


SPECIAL = ("a pipe", "a socket", "a device")  # never read, never replaced


def kind_of(path: Path) -> str:
    """What lies at a path, links followed, as in "must be a file, got …"."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link to nowhere" if path.is_symlink() else "nothing"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return "a file" if stat.S_ISREG(mode) else "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def check_readable(path: Path) -> None:
    """Refuse what cannot be read as a file or folder; Python's own error where nothing is there."""
    kind = kind_of(path)
    if kind == "a link to nowhere":
        where = os.readlink(path)
        raise FileNotFoundError(
            errno.ENOENT, f"must be a file or folder, got a link to nowhere ({where})", str(path)
        )
    if kind in SPECIAL:
        raise OSError(errno.EINVAL, f"must be a file or folder, got {kind}", str(path))
    path.stat()


def open_safetensors(path: Path) -> Any:
    """`safetensors.safe_open` (the library validates the header), with errors that name the file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no safetensors file, or it is truncated or damaged.
    """
    check_readable(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "must be a safetensors file, got a folder", str(path))
    with open(path, "rb"):
        pass  # for Python's own errors, which name the file
    import safetensors

    try:
        return safetensors.safe_open(str(path), framework="pt")
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(
            f"{path} must be a complete safetensors file, got one that is truncated, damaged or of "
            f"another format ({reason})"
        ) from error


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Fill the empty file `path`, with the same bytes for the same tensors and metadata, in their order.

    Tensors that share memory (tied weights) are each written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        dense = tensor.detach().cpu().contiguous()
        ready[name] = dense.clone() if storage in seen else dense
        seen.add(storage)
    try:
        mode = path.stat().st_mode
        save_file(ready, path, metadata=dict(metadata))
        path.chmod(mode)  # newer versions of the library replace the file by a private one
        if len(metadata) > 1:
            _order_metadata(path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error)) from error


def _order_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give the metadata of a safetensors file their order: the library's is another in every run."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) | {"__metadata__": dict(metadata)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # as long as it was, but for a library that writes JSON otherwise
            file.seek(8)
            file.write(text.ljust(length))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if that can be done; read-only folders inside, too."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for folder, _, _ in os.walk(path):
                os.chmod(folder, 0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that hold nothing, but folders that hold nothing."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def remove_leftovers(path: Path) -> None:
    """Remove what a killed program left of an output at `path`: temporaries that nobody holds."""
    form = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{8}}{re.escape(SUFFIX)}")
    try:
        left = [child for child in path.parent.iterdir() if form.fullmatch(child.name)]
    except OSError:
        return
    for child in left:
        lock = _lock(child)
        if lock is not None:
            remove(child)
            os.close(lock)


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    return path.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()[:32]


def _beside(path: Path) -> Path:
    return path.parent / f".{_stem(path)}.{secrets.token_hex(4)}{SUFFIX}"


def _lock(path: Path) -> int | None:
    """Hold a file or folder until the descriptor is closed, by the end of the program at the latest.

    None where another program holds it, or where the file system has no locks.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name is not waited for
    try:
        try:
            descriptor = os.open(path, flags)
        except PermissionError:  # it may be ours nevertheless: a folder is copied with its rights
            os.chmod(path, 0o700, follow_symlinks=False)
            descriptor = os.open(path, flags)
    except (OSError, NotImplementedError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(new: Path, path: Path) -> None:
    """Put folder `new` in the place of folder `path`, in one step where the system has it."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        rename = None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename and rename(here, os.fsencode(new), here, os.fsencode(path), swap) == 0:
        remove(new)
        return
    old = _beside(path)
    try:
        os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    remove(old)


def _sync(path: Path) -> None:
    """Bring a file, or all files of a folder, to the disk, so that a rename never runs ahead."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
        _sync_folder(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems do not sync folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Training and validation images: timm's data sets, loaders and augmentation."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, IterableDataset

from ..distributed.ranks import Ranks
from .settings import Settings

# "torch/fashion_mnist:ROOT", "hfds/NAME", "wds/NAME:ROOT": the names of timm's factory.
NAMED = re.compile(
    r"(?P<name>(?:torch|hfds|hfids|tfds|wds)/[^:]+)(?::(?P<root>.*))?", re.IGNORECASE
)
LOADER = ("batch_size", "hflip", "vflip", "auto_augment")  # settings that have timm's own names
# Folders that timm takes for a split, in its order.
FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}


class UnreadableImage(ValueError):
    """An image that cannot be read. A worker's comes with its traceback: only the sentence is kept."""

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition("UnreadableImage: ")[2].strip())


class Read(Dataset[Any]):
    """What a reader of timm finds; timm's own data set goes on with another image for a damaged one."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.transform = reader, cast(Any, None)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path = f"image {index} of the data"
        try:
            file, label, *_ = self.reader[index]
            path = getattr(file, "name", path)
            with file:
                image = Image.open(file).convert("RGB")
        except Exception as error:  # a damaged file makes PIL raise errors of many kinds
            reason = str(error) or type(error).__name__
            raise UnreadableImage(f"{path} must be a readable image, got: {reason}") from error
        return self.transform(image), -1 if label is None else label


def open_images(
    data: str | os.PathLike[str] | tuple[Any, Any], settings: Settings
) -> tuple[Any, Any, int | None]:
    """The data sets for training and validation, and how many classes they have, if they say it.

    Nothing is downloaded. Raises FileNotFoundError where they are not, ValueError where they are
    not what they should be.
    """
    if isinstance(data, tuple):
        if len(data) != 2 or not all(hasattr(each, "transform") for each in data):
            raise TypeError("data must be a name or two data sets that have a `transform`")
        train, validation = data
    else:
        train = _open(os.fspath(data), settings.train_split, "train", settings)
        validation = _open(os.fspath(data), settings.val_split, "validation", settings)
    names, others = _class_names(train), _class_names(validation)
    if names is not None and others is not None and names != others:
        odd = sorted(set(names) ^ set(others)) or ["another order"]
        raise ValueError(
            f"the training and validation images must have the same classes, got {len(names)} and "
            f"{len(others)}, differing in {odd[0]}"
        )
    if names is not None:
        return train, validation, len(names)
    return train, validation, _declared_classes(train) if settings.class_map is None else None


def _open(spec: str, split: str, purpose: str, settings: Settings) -> Any:
    from timm.data import create_dataset

    named = NAMED.fullmatch(spec)
    name, root = (named["name"], named["root"]) if named else ("", spec)
    for path, wanted in (
        (root, "a folder of images for --data"),
        (settings.class_map, "a file for --class-map"),
    ):
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, f"must be {wanted}, but is not there", path)
    if not named:
        _check_folder(Path(root), split, purpose)
    try:
        made = create_dataset(
            name,
            root=root,
            split=split,
            class_map=cast(Any, settings.class_map),  # a dict, or a file
            is_training=purpose == "train",
            batch_size=settings.batch_size,
            seed=settings.seed,
            download=False,
        )
    except (AssertionError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if name.startswith("torch/") and "not found" in reason.lower():
            raise FileNotFoundError(
                errno.ENOENT,
                f"must hold the files of torchvision's {name[6:]}, in the folders that torchvision "
                "gives them (FashionMNIST/raw/train-images-idx3-ubyte, say)",
                root,
            ) from error
        raise ValueError(
            f"data must be a data set of timm's factory with a split {split!r}, got {spec}: {reason}"
        ) from error
    reads = hasattr(made, "reader") and not isinstance(made, IterableDataset)
    return Read(made.reader) if reads else made


def _check_folder(root: Path, split: str, purpose: str) -> None:
    """A split must have a folder: timm would take the whole of `root` for it."""
    if not root.is_dir():  # timm reads .tar files, which hold one split
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder of images for --data", str(root))
    wanted = dict.fromkeys((split, *(FOLDERS[purpose] if split in FOLDERS[purpose] else ())))
    if not any((root / name).is_dir() for name in wanted):
        held = ", ".join(sorted(child.name for child in root.iterdir())[:6])
        problem = f"must have a folder {' or '.join(wanted)}, got {held or 'nothing'}"
        raise FileNotFoundError(errno.ENOENT, problem, str(root))


def _class_names(dataset: Any) -> list[str] | None:
    """Names of the classes in their order, where the data set has them."""
    index = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if isinstance(index, Mapping) and index:
        return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


def _declared_classes(dataset: Any) -> int | None:
    """The number of classes, where the data set tells it without being read."""
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets):
        return int(torch.as_tensor(targets).max()) + 1
    features = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", None)
    for feature in features.values() if isinstance(features, Mapping) else ():
        if isinstance(count := getattr(feature, "num_classes", None), int):
            return count
    return None


def make_loader(
    dataset: Any,
    given: Mapping[str, Any],
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    *,
    training: bool,
) -> Any:
    """timm's loader: batches [n, channels, height, width] and labels [n], on the device.

    given: what the model takes in, by timm's names (see `input_of`).
    """
    from timm.data import create_loader
    from torchvision.transforms import Compose, Pad

    randomly = {"interpolation": "random"} if training and settings.augment else {}
    try:
        made = create_loader(
            dataset,
            **{**given, **randomly, **settings.named(*LOADER)},
            is_training=training,
            no_aug=not settings.augment,
            scale=(settings.scale_min, 1.0),
            color_jitter=cast(Any, settings.color_jitter or None),
            re_prob=settings.reprob if training else 0.0,
            re_mode=settings.remode,
            re_count=settings.recount,
            num_workers=settings.workers,
            distributed=ranks.size > 1,
            pin_memory=device.type == "cuda",
            device=device,
            # Workers that lived on would go on with random numbers of earlier epochs, which a resumed
            # run does not have.
            persistent_workers=False,
        )
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            "timm must be able to load images with these settings, got "
            f"{type(error).__name__}: {error}"
        ) from error
    # RGB for augmentation, whatever the data set has; in the end one channel where the model has one.
    *steps, to_array = dataset.transform.transforms
    first = [methodcaller("convert", "RGB"), *([Pad(settings.pad)] if settings.pad else [])]
    last = [methodcaller("convert", "L")] if given["input_size"][0] == 1 else []
    dataset.transform = Compose([*first, *steps, *last, to_array])
    return made

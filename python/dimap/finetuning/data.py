"""Training and validation images: timm's data sets, loaders and augmentation."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import IterableDataset

from ..distributed.ranks import Ranks
from .settings import Settings

# "torch/fashion_mnist:ROOT", "hfds/NAME", "wds/NAME:ROOT": the names of timm's factory.
NAMED = re.compile(
    r"(?P<name>(?:torch|hfds|hfids|tfds|wds)/[^:]+)(?::(?P<root>.*))?", re.IGNORECASE
)
# Folders that timm takes for a split, in its order.
FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Images:
    """Two data sets, and how many classes they have (None where they do not say)."""

    train: Any
    validation: Any
    classes: int | None


@dataclass(frozen=True)
class Input:
    """What a model takes in: channels, height and width, and how pixels become numbers."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str


def open_images(
    data: str | os.PathLike[str] | tuple[Any, Any],
    *,
    train_split: str,
    val_split: str,
    class_map: str | None,
    settings: Settings,
) -> Images:
    """The data sets that `data` names; nothing is downloaded.

    Raises FileNotFoundError where they are not, ValueError where they are not what they should be.
    """
    if isinstance(data, tuple):
        if len(data) != 2 or not all(hasattr(each, "transform") for each in data):
            raise TypeError("data must be a name or two data sets that have a `transform`")
        train, validation = data
    else:
        spec = os.fspath(data)
        train = _create(spec, train_split, "train", class_map, settings)
        validation = _create(spec, val_split, "validation", class_map, settings)
    names, others = _class_names(train), _class_names(validation)
    if names is not None and others is not None and names != others:
        odd = sorted(set(names) ^ set(others)) or ["another order"]
        raise ValueError(
            f"the training and validation images must have the same classes, got {len(names)} and "
            f"{len(others)}, differing in {odd[0]}"
        )
    classes = len(names) if names is not None else None
    if classes is None and class_map is None:
        classes = _declared_classes(train)
    return Images(train, validation, classes)


def _create(spec: str, split: str, purpose: str, class_map: str | None, settings: Settings) -> Any:
    from timm.data import create_dataset

    named = NAMED.fullmatch(spec)
    name, root = (named["name"], named["root"]) if named else ("", spec)
    if root is not None and not Path(root).exists():
        raise FileNotFoundError(errno.ENOENT, "must be a folder of images for --data", root)
    if class_map is not None and not Path(class_map).exists():
        raise FileNotFoundError(errno.ENOENT, "must be a file for --class-map", class_map)
    if not named:
        _check_folder(Path(root), split, purpose)
    try:
        return create_dataset(
            name,
            root=root,
            split=split,
            class_map=cast(Any, class_map),  # a dict, or a file
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


def _check_folder(root: Path, split: str, purpose: str) -> None:
    """A split must have a folder: timm would take the whole of `root` for it."""
    if not root.is_dir():  # timm reads .tar files, which hold one split
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder of images for --data", str(root))
    wanted = (split, *FOLDERS[purpose]) if split in FOLDERS[purpose] else (split,)
    if any((root / name).is_dir() for name in wanted):
        return
    held = sorted(child.name for child in root.iterdir())[:6]
    folders = " or ".join(dict.fromkeys(wanted))
    raise FileNotFoundError(
        errno.ENOENT, f"must have a folder {folders}, got {', '.join(held) or 'nothing'}", str(root)
    )


def _class_names(dataset: Any) -> list[str] | None:
    """Names of the classes in their order, where the data set has them."""
    holder = getattr(dataset, "reader", dataset)
    index = getattr(holder, "class_to_idx", None)
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
    given: Input,
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    *,
    training: bool,
) -> Any:
    """timm's loader: batches [n, channels, height, width] and labels [n], on the device."""
    from timm.data import create_loader
    from torchvision.transforms import Compose, Pad

    try:
        made = create_loader(
            dataset,
            input_size=given.size,
            batch_size=settings.batch_size,
            is_training=training,
            no_aug=not settings.augment,
            scale=(settings.scale_min, 1.0),
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=cast(Any, settings.color_jitter or None),
            auto_augment=settings.auto_augment,
            re_prob=settings.reprob if training else 0.0,
            re_mode=settings.remode,
            re_count=settings.recount,
            interpolation="random" if training and settings.augment else given.interpolation,
            mean=given.mean,
            std=given.std,
            crop_pct=given.crop_pct,
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
    last = [methodcaller("convert", "L")] if given.size[0] == 1 else []
    dataset.transform = Compose([*first, *steps, *last, to_array])
    return made


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers and streams which epoch begins."""
    for each in (loader.dataset, getattr(loader, "sampler", None)):
        if tell := getattr(each, "set_epoch", None):
            tell(epoch)


def own_images(loader: Any, ranks: Ranks) -> int | None:
    """Validation images of this process without those that fill up the last; None for a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    return (len(loader.dataset) - ranks.rank + ranks.size - 1) // ranks.size

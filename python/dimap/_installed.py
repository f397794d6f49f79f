"""Whether another project's `dimap` lies in the folder of this one, which is distributed as torch-dimap."""

from __future__ import annotations

from pathlib import Path


def stranger(folder: Path) -> str | None:
    """What to say where a distribution called dimap is installed beside a folder of this package."""
    found = next(folder.parent.glob("dimap-*.dist-info"), None)
    if found is None:
        return None
    return (
        f"another project's dimap is installed in {folder} ({found.name}), and each writes over the other's "
        "files. Keep one: pip uninstall dimap torch-dimap, then install the one that you want again"
    )

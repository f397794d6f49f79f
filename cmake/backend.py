"""The build backend: scikit-build-core, with torch for its headers and libraries.

An isolated build has torch of its own only where the environment that it builds for has none: torch is
gigabytes, one build runs on every torch from 2.10 on, and pip's isolated Python is that environment's.
"""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import (
    get_requires_for_build_editable as _requires_editable,
)
from scikit_build_core.build import (
    get_requires_for_build_wheel as _requires_wheel,
)

OLDEST = (2, 10)


def torch_is_there() -> bool:
    """Whether a torch that is new enough lies in the environment of this Python, isolated or not."""
    try:
        text = Path(sysconfig.get_path("purelib"), "torch", "version.py").read_text(
            encoding="utf-8"
        )
    except OSError:
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return found is not None and tuple(map(int, found.groups())) >= OLDEST


def _torch() -> list[str]:
    if os.environ.get("DIMAP_TORCH") or torch_is_there():  # cmake/DimapTorch.cmake finds it, too
        return []
    return [f"torch>={OLDEST[0]}.{OLDEST[1]}"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*_requires_editable(config_settings), *_torch()]

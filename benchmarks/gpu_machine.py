"""What a result was measured on: GPU, driver, torch, CUDA and commit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch


def run(*command: str) -> str | None:
    """What a command prints, or None where it fails."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def about() -> dict[str, str | None]:
    """Raises RuntimeError where torch has no device."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": run("git", "rev-parse", "--short", "HEAD") or os.environ.get("DIMAP_COMMIT"),
    }

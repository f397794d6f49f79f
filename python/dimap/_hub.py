"""The Hugging Face hub, where it can be reached, or else its cache alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ._errors import first_line, need

PATIENCE = 10  # seconds to wait for an answer


@contextmanager
def reaching_hub(purpose: str) -> Iterator[None]:
    """Ask once whether the hub answers; where it does not, the block reads its cache alone.

    Its client would try again for a minute and more. purpose: first words of an error, "timm models need".

    Raises ModuleNotFoundError without huggingface_hub; OSError for whatever the block raises where the hub
    does not answer.
    """
    utils = need("huggingface_hub", purpose, module="huggingface_hub.utils")
    constants: Any = import_module("huggingface_hub.constants")
    offline, why = constants.HF_HUB_OFFLINE, ""
    if not offline:
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception as error:  # of one HTTP library or another
            constants.HF_HUB_OFFLINE = True
            why = f"{constants.ENDPOINT} does not answer ({first_line(error)})"
    try:
        yield
    except Exception as error:
        if not why:
            raise
        raise OSError(f"{why}, and the hub's cache does not hold it") from error
    finally:
        constants.HF_HUB_OFFLINE = offline

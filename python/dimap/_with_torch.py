"""The operators are registered as soon as torch is imported: by whoever, before dimap or after it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_operators() -> None:
    """Register ``torch.ops.dimap`` now, or when torch has been imported."""
    if "torch" in sys.modules:
        from . import ops  # noqa: F401
    elif not any(isinstance(finder, _TorchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFinder())


class _TorchFinder:
    """Finds torch as the other finders do; its loader then registers the operators after torch.

    An error of torch's own import reaches the caller as it is, and the next attempt is watched too.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._watch(spec)
                    return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        load = getattr(loader, "exec_module", None)
        if loader is None or load is None:
            return

        def load_and_register(module: ModuleType) -> None:
            load(module)
            vars(loader).pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                from . import ops  # noqa: F401
            except Exception as error:  # torch itself is well
                warnings.warn(
                    f"torch.ops.dimap is not there: {error}", RuntimeWarning, stacklevel=2
                )

        # A loader that takes no attributes is left alone: the first use of dimap's names registers.
        with suppress(AttributeError):
            loader.exec_module = load_and_register  # type: ignore[method-assign]

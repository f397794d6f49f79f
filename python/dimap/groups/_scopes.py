"""Kept until the last import of it is gone: see `plan`."""

from . import Located as LayerLike  # noqa: F401
from .plan import Scope as Scope
from .plan import block_name as block_name
from .plan import scope_names as scope_names

"""Kept until the last import of it is gone: see `plan`."""

from . import Model as Model
from .plan import Normalize as Normalize
from .plan import Plan as Plan
from .plan import check_choice as check_choice
from .plan import parameters_of as parameters_of
from .plan import renamed as renamed

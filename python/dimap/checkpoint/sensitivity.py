"""What each module and each layer of a checkpoint loses if it alone is pruned; safetensors stream by."""

from __future__ import annotations

from ..budgets import Weights
from ..distributed.ranks import Ranks
from ..groups import named_tensors, part_of, wholes
from ..groups.plan import Plan
from ..sensitivity import Sensitivity, measure
from .base import Checkpoint, Progress
from .native import Told
from .shards import Shards
from .streaming import Stream, check_dtypes


def measure_checkpoint(checkpoint: Checkpoint, progress: Progress) -> Sensitivity:
    """`dimap.measure_sensitivity` of a checkpoint, of which nothing else is asked than to be read."""
    plan = Plan.of_shapes(
        checkpoint.shapes(), "module", "layer", checkpoint.choice, checkpoint.ties()
    )
    check_dtypes(checkpoint, plan)
    if isinstance(checkpoint, Shards):
        told = Told(progress)
        found = measure(Stream(checkpoint, plan, Ranks(), told).weights())
        told.finish()
        return found
    from ..pruning import surveyed_tensors

    progress.step("surveying")
    state = {name: checkpoint.get(name) for name in wholes(plan.names)}
    tensors = [part_of(named_tensors(state), name).detach() for name in plan.names]
    weights: Weights = surveyed_tensors(plan, tensors, plan.names)
    return measure(weights)

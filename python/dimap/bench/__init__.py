"""How fast: the operators beside a copy, plain PyTorch and torch.nn.utils.prune, on this machine.

dimap.bench.bench("swin_b", quick=True)      # the command: dimap bench --quick
"""

from .run import Bench, Row, bench

__all__ = ["Bench", "Row", "bench"]

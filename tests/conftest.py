"""What all tests share; their helpers lie in tests/helpers. One thread is enough unless a test says otherwise."""

from __future__ import annotations

import pytest
import torch
from dimap import _library

pytest.register_assert_rewrite("checkpoints", "exact", "finetune_problems", "operators")
torch.set_num_threads(2)


@pytest.fixture
def threads():
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn: what holds on the CPU holds on a GPU, where there is one."""
    if request.param == "cuda" and not (_library.has_cuda and torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and dimap built for it")
    return str(request.param)

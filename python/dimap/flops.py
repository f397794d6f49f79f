"""Count the multiply-adds of one forward pass, per parameter, without touching a weight.

Unit: **multiply-adds**, one multiplication with its addition counted once. This is the unit behind
the "FLOPs" of DIMAP's Table 1 (Swin-B 15.4G) and of most vision papers. `FlopCounterMode` counts
the two apart, so every figure here is half of torch's.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
TOKENS = 2048


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one forward pass, batch 1.

    Attributes:
        total: everything torch counts: linear layers, convolutions, matrix products of activations.
        parameters: parameter name -> multiply-adds of the operators that read it; parameters that
            take part in no counted operator (biases, norms, tables) are absent.
        input_size: (channels, height, width) of the image, or (tokens,) of the text, that was counted.
    """

    total: int
    parameters: dict[str, int]
    input_size: tuple[int, ...]

    @property
    def other(self) -> int:
        """Multiply-adds that read no parameter: the attention's products of activations."""
        return self.total - sum(self.parameters.values())


def count_flops(model: nn.Module, input_size: int | Sequence[int] | None = None) -> Flops:
    """Count one forward pass of `model` at batch 1, per parameter.

    A copy of the model without storage (meta device) is run in eval mode, so the count needs no
    memory, no data and no GPU, and `model` keeps its weights, buffers, hooks and training flag.
    An operator belongs to the parameter it reads, whichever module called it: weights that are
    handed to a functional linear (swinv2, torchvision's Swin) count like those of `nn.Linear`.

    Args:
        model: a vision model that takes one image tensor [1, channels, height, width]; or a model of
            transformers that takes `pixel_values`, `input_ids` or both.
        input_size: side, (height, width) or (channels, height, width) in pixels; None asks the
            model (see `default_input_size`). Of a model of text alone, its tokens; None counts as
            many as it takes, at most 2,048.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: `input_size` is malformed, or None where the model does not say it.
        RuntimeError: the forward pass failed at this size.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    skeleton = _skeleton(model)
    run = getattr(skeleton, "_orig_mod", skeleton)  # what torch.compile wraps: run it as written
    size, arguments, named = _inputs(model, input_size, signature(run.forward).parameters)
    counter = FlopCounterMode(display=False)
    by_parameter = _ByParameter(skeleton, counter)
    try:
        # The math backend spells attention out as two products; fused kernels lack formulas
        # on some devices.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, by_parameter:
            run(*arguments, **named)
    except Exception as error:
        raise RuntimeError(
            f"counting FLOPs needs a forward pass of {type(model).__name__} on an input of shape "
            f"{[1, *size]}, which failed: {error}"
        ) from error
    # Twice the multiply-adds: every formula of a forward operator is 2 * (a product of sizes).
    counts = {name: count // 2 for name, count in by_parameter.counts.items()}
    return Flops(counter.get_total_flops() // 2, counts, size)


def _inputs(
    model: nn.Module, input_size: int | Sequence[int] | None, takes: Container[str]
) -> tuple[tuple[int, ...], list[Tensor], dict[str, Tensor]]:
    """The size that is counted, and the arguments of the forward pass, which takes those names."""
    named = {}
    words = [name for name in ("input_ids", "decoder_input_ids") if name in takes]
    if words:
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        tokens = min(getattr(config, "max_position_embeddings", TOKENS), TOKENS)
        if "pixel_values" not in takes and input_size is not None:
            if not isinstance(input_size, int) or input_size < 1:
                raise ValueError(f"input_size must be a number of tokens, got {input_size!r}")
            tokens = input_size
        named = {w: torch.zeros(1, tokens, dtype=torch.long, device=META) for w in words}
        if "pixel_values" not in takes:
            return (tokens,), [], named
    size = full_size(model, default_input_size(model) if input_size is None else input_size)
    image = torch.empty(1, *size, device=META)
    if "pixel_values" in takes:
        return size, [], {**named, "pixel_values": image}
    return size, [image], named


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(height, width) the model says it was built for.

    Looked up in this order: `patch_embed.img_size` (timm), `image_size` (torchvision's ViT),
    `config.image_size` and `config.vision_config.image_size` (Hugging Face),
    `pretrained_cfg["input_size"]` (timm), and 224 (Swin V2: 256) for other torchvision models.

    Raises:
        ValueError: none of these is there.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    said = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
        getattr(getattr(getattr(model, "config", None), "vision_config", None), "image_size", None),
        config.get("input_size") if isinstance(config, Mapping) else None,
    )
    for size in said:
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, Sequence) and len(size) in (2, 3):
            return tuple(int(side) for side in size[-2:])
    if type(model).__module__.startswith("torchvision.models."):
        v2 = any(type(module).__name__ == "SwinTransformerBlockV2" for module in model.modules())
        return (256, 256) if v2 else (224, 224)
    raise ValueError(
        "input_size must be given (for example input_size=224): "
        f"{type(model).__name__} does not say the size of its input"
    )


def full_size(model: nn.Module, size: int | Sequence[int]) -> tuple[int, ...]:
    """(channels, height, width); channels default to what the first convolution reads, else 3."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(
            "input_size must be a side, (height, width) or (channels, height, width) in positive "
            f"pixels, got {size!r}"
        )
    if len(sides) == 3:
        return sides
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return (next(convolutions, 3), *sides)


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy of `model` in eval mode with meta tensors and no hooks; reads no weight."""
    # deepcopy takes what the memo holds for an object instead of copying it.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _own_tensors(module):
            # One floating dtype for all: counts do not depend on it, and mixtures cannot clash.
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=dtype, device=META)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            memo.setdefault(id(tensor), empty)
        # A copied hook would still call the user's function.
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            memo[id(getattr(module, hooks))] = OrderedDict()
    return copy.deepcopy(model, memo).eval()


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor))


class _ByParameter(TorchDispatchMode):
    """Credits what `counter` adds for an operator to the parameter that the operator reads."""

    def __init__(self, model: nn.Module, counter: Any) -> None:
        super().__init__()
        self.counter = counter
        self.counts: dict[str, int] = {}
        # Views (w.t() in a linear) share the storage of their parameter. Vectors are left out:
        # in addmm the bias comes before the weight, and the weight does the work.
        self.names = {_storage(p): name for name, p in model.named_parameters() if p.ndim > 1}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:  # a constant that the forward pass made on a real device
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(META), (args, kwargs))
        before = self.counter.get_total_flops()
        out = func(*args, **kwargs)
        flops = self.counter.get_total_flops() - before
        if flops:
            found = [t for t in tensors if t.device == META and _storage(t) in self.names]
            if found:
                name = self.names[_storage(max(found, key=lambda t: math.prod(t.shape)))]
                self.counts[name] = self.counts.get(name, 0) + flops
        return out


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""The types of weights that the engine takes, known without torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Name: TypeAlias = Literal["float32", "bfloat16", "float16"]


class EngineDtype(NamedTuple):
    """code: in safetensors. name: in torch. number: in `_C`. zero_bits: low ones, zero in every key."""

    code: str
    name: Name
    number: int
    zero_bits: int


ENGINE_DTYPES = (
    EngineDtype("F32", "float32", 0, 0),
    EngineDtype("BF16", "bfloat16", 1, 16),
    EngineDtype("F16", "float16", 2, 13),
)
BY_CODE = {dtype.code: dtype for dtype in ENGINE_DTYPES}
BY_NAME: dict[str, EngineDtype] = {dtype.name: dtype for dtype in ENGINE_DTYPES}

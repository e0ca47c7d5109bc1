"""`triton.jit` where Triton is installed; elsewhere a kernel stays a plain function, so that its module still imports.

Annotations of a kernel's parameters must be strings (`from __future__ import annotations`): nothing of Triton is then
touched before a launch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None


def jit(fn: Any) -> Any:
    """`fn` as a Triton kernel, or unchanged where Triton is not installed.

    Numbers of rows are never compiled in: Triton would make a kernel of its own for 1 and for multiples of 16.
    """
    if not HAS_TRITON:
        return fn
    import triton

    counted = [name for name in ("num_rows",) if name in inspect.signature(fn).parameters]
    return triton.jit(fn, do_not_specialize=counted)


def takes_torch(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` is computed by its torch definition: on a CPU, unless the interpreter runs the kernels.

    `ANABRANCH_INTERPRET=1` beside `TRITON_INTERPRET=1` sends ops to their kernels on a CPU too, so that a whole model
    can be tested by the very launches that a GPU gets.
    """
    return tensor.device.type == "cpu" and not _interprets()


def wrap(kernel: Any) -> Any:
    """A kernel as a Triton op launches it: traceable, but for the interpreter's."""
    return kernel if _interprets() else torch.library.wrap_triton(kernel)


def _interprets() -> bool:
    return os.environ.get("ANABRANCH_INTERPRET") == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`, which is at least 1: tiles have such sizes."""
    return 1 << (number - 1).bit_length()


def define_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches Triton kernels as the torch op `name`.

    mutates_args: the parameters that it writes to; no others
    Where Triton is not installed it is an opaque op, and needs a fake implementation.
    """
    # torch warns of a Triton op without Triton.
    register: Any = torch.library.triton_op if HAS_TRITON else torch.library.custom_op
    decorator: Callable[[Callable[..., Any]], Any] = register(name, mutates_args=mutates_args)
    return decorator

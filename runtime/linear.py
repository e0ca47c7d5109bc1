"""The linear layer, in the fastest form that this machine has for it."""

from __future__ import annotations

import torch
from torch import Tensor


def has_packed_linear() -> bool:
    """Whether torch was built with oneDNN's linear over weights packed ahead."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear:
    """x @ weight.T + bias.

    In fp32 on a CPU the weight is packed once into oneDNN's blocked layout and the plain copy is not kept. Milliseconds
    for all linears of SmolLM2 (at 512 rows without the LM head), summed from benchmarks/linear.py on one thread of an
    AMD EPYC (Zen 5, AVX-512):

        rows        1     2     8    32    64   512
        F.linear   31    55    57   119   194  1037
        packed     16    17    22    48    81   448

    A packed weight gives a row the same bits for any number of rows from 2, as the same script checks; one row alone
    may differ, so `Decoder` pads it to two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        """weight: [out_features, in_features]; bias: [out_features]; both of the dtype and device to compute in.

        pack: False keeps the plain weight, for kernels that read it
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        packable = weight.dtype == torch.float32 and weight.device.type == "cpu" and has_packed_linear()
        self._packed = pack and packable
        # The hint is a typical batch size; the layout, and the time at 1 to 512 rows, did not depend on it.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32) if self._packed else weight

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]. Raises ValueError if only its packed form was kept."""
        if self._packed:
            raise ValueError("the weight is packed for this CPU: load the decoder with pack=False")
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features]. Returns [num_rows, out_features]."""
        if self._packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return out
        return torch.nn.functional.linear(x, self._weight, self.bias)

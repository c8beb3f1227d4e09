"""The AU gate: the only steering arithmetic of the repository.

An atomic unit (AU) is one dimension of one block activation (paper, section 3.1). A gate sits at one site of one layer
and applies `x -> x + x * scale + shift` to its AUs (section 4.2 with scale = gamma).

Rules that keep it harmless:
- an idle gate returns its very input, so an unsteered patched model is bit-equal to upstream;
- it has no parameters and no buffers: the state dict is upstream's, and idle is `None` (a buffer of ones would come
  back from `from_pretrained` as uninitialised memory);
- it never works in place and never reads a value back to the host: gradients, CUDA graphs and torch.compile work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# attention: input of o_proj      ffn: output of the MLP block      layer: output of the decoder layer
# neuron: input of the MLP's down_proj, its inner activations
SITES = ("attention", "ffn", "layer", "neuron")


class AUGate(nn.Module):
    """Steer activations of shape (batch, tokens, width); the identity until `set`."""

    def __init__(self, site: str, layer: int, width: int):
        super().__init__()
        self.site, self.layer, self.width = site, layer, width
        self.tap: Callable[[Tensor], Tensor] | None = None  # screening reads here, after steering
        self.clear()

    def set(self, scale: Tensor | None, shift: Tensor | None, like: Tensor) -> None:
        """Steer by float32 `scale` and `shift`, each (width,) or one row per sequence, (batch, 1, width).

        Values are rounded once, here, to the dtype of `like`, a tensor on the gate's device.
        """
        device = "cpu" if like.is_meta else like.device  # for offloaded layers the forward moves them
        self.scale = None if scale is None else scale.to(device=device, dtype=like.dtype)
        self.shift = None if shift is None else shift.to(device=device, dtype=like.dtype)

    def clear(self) -> None:
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.positions: Tensor | None = None  # (batch, tokens, 1) of bool, or None for every position

    @property
    def idle(self) -> bool:
        return self.scale is None and self.shift is None and self.tap is None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None or self.shift is not None:
            steered = x
            if self.scale is not None:
                # two roundings, as the authors': x * (1 + scale) differs in a quarter of all values
                steered = x + x * self.align(self.scale.to(device=x.device, dtype=x.dtype))
            if self.shift is not None:
                steered = steered + self.align(self.shift.to(device=x.device, dtype=x.dtype))
            if self.positions is not None:
                steered = torch.where(self.align_positions(self.positions.to(x.device)), steered, x)
            x = steered
        return x if self.tap is None else self.tap(x)

    # What the gates of experts do otherwise (experts.py): there, activations are rows of single tokens.

    def rows(self, x: Tensor) -> int:
        """Return the number of texts in a batch of activations."""
        return len(x)

    def align(self, values: Tensor) -> Tensor:
        """Bring values per AU, (width,) or (batch, 1, width), to where they meet activations."""
        return values

    def align_positions(self, positions: Tensor) -> Tensor:
        return positions

    def dense(self, x: Tensor) -> Tensor:
        """Return activations as (batch, tokens, width)."""
        return x

    def extra_repr(self) -> str:
        return f"{self.site}, layer {self.layer}, {self.width} AUs" + (", set" if self.scale is not None else "")

"""ShakeDrop regularisation (Yamada et al., 2018, arXiv 1802.02375)."""

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor


@register_notrace_module  # torch.fx cannot follow a number of samples into a draw
class ShakeDrop(nn.Module):
    """With probability `p`, drawn once a batch, scales samples by α ~ U(-1, 1) and their gradients by β ~ U(0, 1).

    α and β are independent and drawn for each sample of x [B, C, H, W]; evaluation scales by the mean factor 1 - p.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.p)
        alpha, beta = self.draw(len(x), x.device)
        # Together α·x, but only the first term has a gradient. Cast, so that half precision goes on after it.
        return x * beta.to(x.dtype) + (x * (alpha - beta).to(x.dtype)).detach()

    def draw(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """This batch's forward and backward factors, both [B, 1, 1, 1]; all ones where the batch is spared."""
        # torch.where instead of a Python branch: no wait for the device, no break in a compiled graph.
        shaken = torch.rand((), device=device) < self.p
        alpha = torch.rand(batch, 1, 1, 1, device=device) * 2 - 1
        beta = torch.rand(batch, 1, 1, 1, device=device)
        return torch.where(shaken, alpha, 1.0), torch.where(shaken, beta, 1.0)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"

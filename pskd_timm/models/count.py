"""How large a network is."""

import torch
from timm import create_model
from torch.utils.flop_counter import FlopCounterMode


def parameters_and_macs(name: str, num_classes: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image of the model's own input size; nothing is allocated or computed."""
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes).eval()
        image = torch.zeros(1, *model.default_cfg["input_size"])
        with FlopCounterMode(display=False) as flops:
            model(image)
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2

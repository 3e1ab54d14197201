#!/usr/bin/env bash
# torch 2.14.1: `SGD(momentum=0.9, fused=True)` under a GradScaler whose first step overflows, which is common with float16 and the
# default scale of 65,536. The step is skipped, but the momentum buffers have been made by then, of memory as it lay there, and the
# skipped kernel does not fill them: the second step adds what earlier tensors left behind to the weights. Without `fused` there are no
# buffers until a step is taken, and the weights are right. (On the CPU here; the kernel for CUDA is written alike.)
#
# Input: twenty weights of 1, a learning rate of 0.1, an infinite gradient, then one of 1: the weights should be 0.9.
# Seen: 0.9 without fused; with it 0.9 for some of the weights, others for the rest, such as 1.17, −4·10¹⁷ and −∞.
# Expected before: no buffer, or one of zeros, and 0.9.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.nn import Parameter


def trained(fused):
    weights = [Parameter(torch.ones(100_000)) for _ in range(20)]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for slope in (torch.inf, 1.0):
        used = [torch.full((100_000,), 3.0) for _ in range(40)]  # as a network's activations would be
        del used
        optimizer.zero_grad()
        loss = sum((each * slope).sum() for each in weights)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        held = sum("momentum_buffer" in optimizer.state[each] for each in weights)
        print(f"fused {fused}, slope {slope}: momentum for {held} of 20 weights")
    return sorted({round(value, 4) for each in weights for value in (each.min().item(), each.max().item())})


print("torch", torch.__version__)
plain, fused = trained(False), trained(True)
print("weights without fused:", plain, " with:", fused)
assert plain == [0.9] and fused != [0.9]
PY

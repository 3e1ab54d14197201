#!/usr/bin/env bash
# torchvision 0.29.1: under bfloat16 autocast a detector's boxes are bfloat16 too, since its box coder takes the reference boxes into the
# type of what the heads predict. bfloat16 has eight bits for a coordinate: between 256 and 512 pixels whole even ones, above 512
# multiples of 4, above 1024 of 8. Anchors' and proposals' places are rounded that way before anything is learned or scored, so that even
# exact predictions lose overlap: at 800 to 1,333 pixels, the published size, boxes of 32 pixels keep 0.91 of it on average,
# some of them 0.71.
#
# Input: a Faster R-CNN with random weights and a random picture of 800×1333, and boxes of 32 pixels decoded from zeros, which stand for
# "as the proposal is". Seen: float32 boxes without autocast, bfloat16 ones with it, all multiples of 4 above 512.
# Expected before: float32 boxes, since the losses and NMS are computed in float32 under autocast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import torchvision
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.ops import box_iou

print("torchvision", torchvision.__version__)
torch.manual_seed(0)
detector = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0, num_classes=21).eval()
picture = torch.rand(3, 800, 1333)
with torch.no_grad():
    plain = detector([picture])[0]["boxes"]
    with torch.autocast("cpu", torch.bfloat16):
        half = detector([picture])[0]["boxes"]
rest = half.float()[half > 512] % 4
print(f"without: {plain.dtype}, {(plain[plain > 512] % 4).unique().numel()} remainders of 4 above 512 pixels")
print(f"with: {half.dtype}, remainders {rest.unique().tolist()} of {rest.numel()} coordinates")
assert plain.dtype == torch.float32 and half.dtype == torch.bfloat16 and not rest.any()

corners = torch.rand(2_000, 2) * torch.tensor([1300.0, 768.0])
proposals = torch.cat([corners, corners + 32], 1)
kept = {}
for dtype in (torch.float32, torch.bfloat16):
    decoded = detector.roi_heads.box_coder.decode(torch.zeros(2_000, 4, dtype=dtype), [proposals])[:, 0].float()
    kept[dtype] = box_iou(decoded, proposals).diagonal()
    print(f"{dtype}: overlap with the proposal, mean {kept[dtype].mean():.3f}, least {kept[dtype].min():.3f}")
assert kept[torch.float32].min() > 0.999 and kept[torch.bfloat16].mean() < 0.95
PY

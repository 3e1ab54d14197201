"""Networks for small images; importing this module adds them to timm's registry."""

from . import densenet, preact_resnet, pyramidnet, resnet, resnext  # noqa: F401

PAPER_NAMES = {
    "cifar_preact_resnet18": "PreAct ResNet-18",
    "cifar_preact_resnet101_paper": "PreAct ResNet-101",
    "cifar_densenet121": "DenseNet-121",
    "cifar_resnext29_8x64d": "ResNeXt-29",
    "cifar_pyramidnet200_a240": "PyramidNet-200",
    "cifar_pyramidnet200_a240_shakedrop": "PyramidNet-200 + ShakeDrop",
    "resnet152": "ResNet-152",
    "densenet264": "DenseNet-264",
}

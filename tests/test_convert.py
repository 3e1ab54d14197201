"""Small networks written from the description of the authors' code, with its names, against their converted twins."""

from itertools import pairwise

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, Linear, Sequential

import pskd_timm.models  # noqa: F401
from pskd_timm.models.convert import convert_checkpoint


def conv(in_chs, out_chs, kernel=1, stride=1, groups=1):
    return Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=False)


def classify(linear, x):
    return linear(x.mean((2, 3)))


class OldPreActBlock(nn.Module):
    def __init__(self, in_chs, chs, stride):
        super().__init__()
        self.bn1, self.conv1 = BatchNorm2d(in_chs), conv(in_chs, chs, 3, stride)
        self.bn2, self.conv2 = BatchNorm2d(chs), conv(chs, chs, 3)
        if stride != 1 or in_chs != chs:
            self.shortcut = Sequential(conv(in_chs, chs, 1, stride))

    def forward(self, x):
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (self.shortcut(active) if hasattr(self, "shortcut") else active)


class OldBottleneck(nn.Module):
    def __init__(self, in_chs, chs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(in_chs, chs), BatchNorm2d(chs)
        self.conv2, self.bn2 = conv(chs, chs, 3, stride), BatchNorm2d(chs)
        self.conv3, self.bn3 = conv(chs, 4 * chs), BatchNorm2d(4 * chs)
        self.shortcut = Sequential()
        if stride != 1 or in_chs != 4 * chs:
            self.shortcut = Sequential(conv(in_chs, 4 * chs, 1, stride), BatchNorm2d(4 * chs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.shortcut(x))


class OldResNet(nn.Module):
    def __init__(self, block, expansion, depths, width=64):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 3), BatchNorm2d(width)
        self.layers = [f"layer{s}" for s in range(1, len(depths) + 1)]
        in_chs = width
        for s, (name, depth) in enumerate(zip(self.layers, depths, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(block(in_chs, width * 2**s, 2 if s and not i else 1))
                in_chs = width * 2**s * expansion
            self.add_module(name, Sequential(*blocks))
        self.linear = Linear(in_chs, 100)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.layers:
            x = getattr(self, name)(x)
        return classify(self.linear, x)


class OldDenseLayer(nn.Module):
    def __init__(self, in_chs, growth):
        super().__init__()
        self.bn1, self.conv1 = BatchNorm2d(in_chs), conv(in_chs, 4 * growth)
        self.bn2, self.conv2 = BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

    def forward(self, x):
        return torch.cat([self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))), x], 1)


class OldTransition(nn.Module):
    def __init__(self, in_chs, out_chs):
        super().__init__()
        self.bn, self.conv = BatchNorm2d(in_chs), conv(in_chs, out_chs)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class OldDenseNet(nn.Module):
    def __init__(self, depths, growth=32):
        super().__init__()
        chs = 2 * growth
        self.conv1, self.order = conv(3, chs, 3), []
        for s, depth in enumerate(depths, start=1):
            self.add_module(f"dense{s}", Sequential(*(OldDenseLayer(chs + i * growth, growth) for i in range(depth))))
            chs += depth * growth
            self.order += [f"dense{s}"]
            if s < len(depths):
                self.add_module(f"trans{s}", OldTransition(chs, chs // 2))
                chs //= 2
                self.order += [f"trans{s}"]
        self.bn, self.linear = BatchNorm2d(chs), Linear(chs, 100)

    def forward(self, x):
        x = self.conv1(x)
        for name in self.order:
            x = getattr(self, name)(x)
        return classify(self.linear, F.relu(self.bn(x)))


class OldResNeXtBlock(nn.Module):
    def __init__(self, in_chs, out_chs, inner, groups, stride):
        super().__init__()
        self.conv_reduce, self.bn_reduce = conv(in_chs, inner), BatchNorm2d(inner)
        self.conv_conv, self.bn = conv(inner, inner, 3, stride, groups), BatchNorm2d(inner)
        self.conv_expand, self.bn_expand = conv(inner, out_chs), BatchNorm2d(out_chs)
        self.shortcut = Sequential()
        if in_chs != out_chs:
            self.shortcut.add_module("shortcut_conv", conv(in_chs, out_chs, 1, stride))
            self.shortcut.add_module("shortcut_bn", BatchNorm2d(out_chs))

    def forward(self, x):
        y = F.relu(self.bn_reduce(self.conv_reduce(x)))
        y = self.bn_expand(self.conv_expand(F.relu(self.bn(self.conv_conv(y)))))
        return F.relu(self.shortcut(x) + y)


class OldResNeXt(nn.Module):
    def __init__(self, depth, groups, width=64):
        super().__init__()
        self.conv_1_3x3, self.bn_1 = conv(3, width, 3), BatchNorm2d(width)
        chs = [width, 4 * width, 8 * width, 16 * width]
        for s, (in_chs, out_chs) in enumerate(pairwise(chs), start=1):
            stage = Sequential()
            for i in range(depth):
                block = OldResNeXtBlock(in_chs, out_chs, groups * out_chs // 4, groups, 2 if s > 1 and not i else 1)
                stage.add_module(f"stage_{s}_bottleneck_{i}", block)
                in_chs = out_chs
            self.add_module(f"stage_{s}", stage)
        self.classifier = Linear(chs[-1], 100)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        return classify(self.classifier, self.stage_3(self.stage_2(self.stage_1(x))))


class OldPyramidBlock(nn.Module):
    def __init__(self, in_chs, chs, stride, p):
        super().__init__()
        self.bn1, self.conv1 = BatchNorm2d(in_chs), conv(in_chs, chs)
        self.bn2, self.conv2 = BatchNorm2d(chs), conv(chs, chs, 3, stride)
        self.bn3, self.conv3 = BatchNorm2d(chs), conv(chs, 4 * chs)
        self.bn4, self.p = BatchNorm2d(4 * chs), p
        self.shortcut = AvgPool2d(2) if stride == 2 else Sequential()

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x)))))
        y = self.bn4(self.conv3(F.relu(self.bn3(y)))) * (1 - self.p)
        x = self.shortcut(x)
        return y + torch.cat([x, x.new_zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])], 1)


class OldPyramidNet(nn.Module):
    """In evaluation only, where ShakeDrop is a factor."""

    def __init__(self, depth, alpha, last_p=0.0):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), BatchNorm2d(16)
        in_chs, blocks, growing = 16, [], 16.0
        for i in range(3 * depth):
            growing += alpha / (3 * depth)
            stride = 2 if i in (depth, 2 * depth) else 1
            blocks.append(OldPyramidBlock(in_chs, int(round(growing)), stride, last_p * (i + 1) / (3 * depth)))
            in_chs = 4 * int(round(growing))
        self.layer1, self.layer2, self.layer3 = (Sequential(*blocks[s * depth :][:depth]) for s in range(3))
        self.bn_final, self.fc = BatchNorm2d(in_chs), Linear(in_chs, 100)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return classify(self.fc, F.relu(self.bn_final(x)))


TINY = {
    "cifar_preact_resnet_tiny": lambda: OldResNet(OldPreActBlock, 1, (1, 1, 1), width=16),
    "cifar_resnet_tiny": lambda: OldResNet(OldBottleneck, 4, (1, 1, 1), width=8),
    "cifar_densenet_tiny": lambda: OldDenseNet((2, 2, 2), growth=8),
    "cifar_resnext_tiny": lambda: OldResNeXt(1, groups=2, width=8),
    "cifar_pyramidnet_tiny": lambda: OldPyramidNet(2, alpha=10),
    "cifar_pyramidnet_tiny_shakedrop": lambda: OldPyramidNet(2, alpha=10, last_p=0.5),
}
WHOLE = {
    "cifar_preact_resnet18": lambda: OldResNet(OldPreActBlock, 1, (2, 2, 2, 2)),
    "cifar_resnet101": lambda: OldResNet(OldBottleneck, 4, (3, 4, 23, 3)),
    "cifar_preact_resnet101_paper": lambda: OldResNet(OldBottleneck, 4, (3, 4, 23, 3)),
    "cifar_densenet121": lambda: OldDenseNet((6, 12, 24, 16)),
    "cifar_resnext29_8x64d": lambda: OldResNeXt(3, groups=8),
    "cifar_pyramidnet200_a240": lambda: OldPyramidNet(22, alpha=240),
    "cifar_pyramidnet200_a240_shakedrop": lambda: OldPyramidNet(22, alpha=240, last_p=0.5),
    "resnet152": torchvision.models.resnet152,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def randomised(model):
    """Batch norms with values of their own, so that two of the same shape cannot be swapped unseen."""
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return model.eval()


def assert_twins(old, new, checkpoint):
    new.eval().load_state_dict(convert_checkpoint(checkpoint, new))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(new(x), old(x))


@pytest.mark.parametrize("name", TINY)
def test_a_converted_network_computes_what_the_old_one_did(name):
    old = randomised(TINY[name]())
    assert_twins(old, timm.create_model(name), {"net": old.state_dict(), "epoch": 299, "best_acc": 79.1})


@pytest.mark.parametrize("name", TINY)
def test_the_prefix_of_parallel_training_and_a_bare_state_dict_are_understood(name):
    old = randomised(TINY[name]())
    state = {f"module.{key}": tensor for key, tensor in old.state_dict().items()}
    assert_twins(old, timm.create_model(name), state)


def test_two_preact_blocks_a_stage_keep_their_identity_shortcuts():
    old = randomised(OldResNet(OldPreActBlock, 1, (2, 2, 2, 2), width=8))
    assert_twins(old, timm.create_model("cifar_preact_resnet18", width=8), {"net": old.state_dict()})


def test_imagenets_bottlenecks_have_torchvisions_names_and_values():
    old = randomised(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]))
    assert_twins(old, TimmResNet(TimmBottleneck, (1, 1, 1, 1)), {"net": old.state_dict()})


@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_of_the_whole_network_finds_its_place(name):
    with torch.device("meta"):
        old, new = WHOLE[name](), timm.create_model(name)
    converted = convert_checkpoint({"net": old.state_dict()}, new)
    assert len(converted) == len(old.state_dict()) == len(new.state_dict())
    new.load_state_dict(converted, assign=True)


@pytest.mark.parametrize("name", [*TINY, *WHOLE])
def test_a_state_dict_in_our_names_passes_through(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    converted = convert_checkpoint(state, model)
    assert list(converted) == list(state)
    assert all(converted[key] is state[key] for key in state)


def test_another_number_of_classes_is_refused_with_name_and_both_shapes():
    model = timm.create_model("cifar_preact_resnet_tiny", num_classes=10)
    with pytest.raises(ValueError, match=r"linear\.weight is \(100, 64\) .* head\.fc\.weight is \(10, 64\)"):
        convert_checkpoint({"net": TINY["cifar_preact_resnet_tiny"]().state_dict()}, model)


def test_a_missing_tensor_is_named():
    state = TINY["cifar_densenet_tiny"]().state_dict()
    del state["dense2.1.conv2.weight"]
    with pytest.raises(
        ValueError, match=r"stages\.1\.blocks\.1\.conv2\.weight \(8, 32, 3, 3\) is not in the checkpoint"
    ):
        convert_checkpoint(state, timm.create_model("cifar_densenet_tiny"))


def test_a_tensor_too_many_is_named():
    state = OldResNet(OldPreActBlock, 1, (1, 1, 2), width=16).state_dict()
    with pytest.raises(ValueError, match=r"layer3\.1\.bn1\.weight \(64,\) is not in the model"):
        convert_checkpoint(state, timm.create_model("cifar_preact_resnet_tiny"))


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_of_another_family_is_refused(name):
    model = timm.create_model(name)
    for other in TINY:
        if other.split("_")[1] != name.split("_")[1]:
            with pytest.raises(ValueError, match="in the (model|checkpoint)"):
                convert_checkpoint(TINY[other]().state_dict(), model)

"""Formulas in NumPy float64 from the papers, and a network that says what it is told: what losses are held against."""

import numpy as np
from torch import nn


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(q, z):
    """Mean over the rows of −Σ q · log softmax(z)."""
    return -(q * np.log(softmax(z))).sum(1).mean()


def kl(q, p):
    """Mean over the rows of Σ q · log(q / p)."""
    return (q * (np.log(q) - np.log(p))).sum(1).mean()


class Echo(nn.Module):
    """A network whose logits are its input: the test chooses them."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x):
        return x

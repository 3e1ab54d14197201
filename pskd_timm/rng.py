"""Counter-based random numbers: each draw is a pure function of (seed, epoch, sample, draw).

So a draw does not depend on ranks, workers, batch layout or resume, and nothing has to be saved to repeat it.
The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    """The 64 bits of `value` as the signed integer that torch.int64 holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    for shift, factor in _MIX:
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch.int64 shifts copy the sign bit; the mixer needs zeros to come in.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    for shift, factor in _MIX:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return z ^ _shift_right(z, 31)


def derive_key(*keys: int) -> int:
    """One 63-bit key from several integers, the order of which matters; a seed for any generator."""
    state = 0
    for key in keys:
        state = _mix_int((state + _GOLDEN + (key & _MASK)) & _MASK)
    return state >> 1


def bits(key: int, counters: Tensor) -> Tensor:
    """64 random bits (int64) for each of `counters` (int64, any shape), as a function of `key` and the counter alone."""
    return _mix(_mix(counters * _signed(_GOLDEN) + _signed(_mix_int(key & _MASK))))


def uniform(key: int, counters: Tensor) -> Tensor:
    """Uniform float32 draws in [0, 1), one for each of `counters` (int64, any shape)."""
    # 24 bits fill a float32 mantissa: every value is exact on every device.
    return _shift_right(bits(key, counters), 40).float() * 2.0**-24


def integers(key: int, counters: Tensor, high: Tensor | int) -> Tensor:
    """Uniform int64 draws in [0, high), one for each of `counters`; `high` at most 2**31, a number or one per counter."""
    return _shift_right(_shift_right(bits(key, counters), 32) * high, 32)


def normal(key: int, counters: Tensor) -> Tensor:
    """Standard normal float32 draws (Box and Muller, 1958), one for each of `counters`."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(derive_key(key, 1), counters)))
    return radius * torch.cos(2.0 * math.pi * uniform(derive_key(key, 2), counters))

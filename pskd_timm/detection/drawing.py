"""Boxes drawn into copies of pictures."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

DETECTED, TRUE = "#ff7a00", "#ffffff"  # a detection; an object as it is marked in the data
INK = "#101010"  # of words, and of the rim that keeps a line visible on any ground
LETTERS = 28  # of a label's height in a picture's shorter side


class Box(NamedTuple):
    """A box (left, top, right, bottom) in pixels from 0, its colour, and what stands at its upper edge."""

    corners: Sequence[float]
    colour: str
    label: str = ""


def drawn(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB picture with `boxes`, the last on top; lines and letters grow with the picture."""
    copy = picture.convert("RGB")
    pen = ImageDraw.Draw(copy)
    shorter = min(copy.size)
    width, size = max(3, round(shorter / 150)), max(11, round(shorter / LETTERS))
    font = ImageFont.load_default(size)
    for box in boxes:
        left, top, right, bottom = _on_pixels(box.corners, copy.size)
        pen.rectangle((left, top, right, bottom), outline=INK, width=width + 2)
        pen.rectangle(
            (left + 1, top + 1, max(left + 1, right - 1), max(top + 1, bottom - 1)), outline=box.colour, width=width
        )
    for box in boxes:
        if box.label:
            _write(pen, box, font, copy.size)
    return copy


def _on_pixels(corners: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box as whole pixels of a picture of `size`, the last ones included, at least one wide and high."""
    left, top = (min(max(0, round(corner)), side - 1) for corner, side in zip(corners[:2], size, strict=True))
    right, bottom = (min(round(corner), side) - 1 for corner, side in zip(corners[2:], size, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _write(pen: ImageDraw.ImageDraw, box: Box, font, size: tuple[int, int]):
    """The label on a ground of the box's colour: above the box, or inside it where there is no room."""
    left, top, _, _ = _on_pixels(box.corners, size)
    x0, y0, x1, y1 = pen.textbbox((0, 0), box.label, font=font)
    wide, high = x1 - x0 + 6, y1 - y0 + 6
    at = max(0, min(left, size[0] - wide)), top - high if top >= high else top
    pen.rectangle((*at, at[0] + wide, at[1] + high), fill=box.colour)
    pen.text((at[0] + 3 - x0, at[1] + 3 - y0), box.label, fill=INK, font=font)

"""Figures as SVG inside a page, in its colours and font."""

import io
import re
import warnings

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from . import plots

CSS_COLOURS = {
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.GRID: "var(--grid)",
    "#000000": "var(--baseline)",
}


def svg(figure: Figure, label: str) -> Markup:
    """A figure as inline SVG that takes the page's font and colours; `label` is what a screen reader says."""
    file = io.StringIO()
    # The salt keeps the ids of one drawing apart from another's. The page's font has letters that matplotlib's lacks.
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    # Inside tags only, where there are coordinates, colours and names of things; words and their numbers stay as they are.
    text = re.sub(r"<[^>]*>", _slim_tag, text)
    head = re.search(r"<svg [^>]*>", text)
    view = re.search(r'viewBox="[^"]*"', head[0])[0]
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = text[head.end() :].replace("\n\n", "\n")
    return Markup(f'<svg class="plot" {view} {link} role="img" aria-label="{Markup.escape(label)}">{body}')


def _slim_tag(tag: re.Match) -> str:
    """A tag with coordinates to a hundredth of a point, the page's colours and font, and no ids that nothing refers to."""
    text = re.sub(r" id=\"(?![phm][0-9a-f]{10})[^\"]*\"", "", tag[0])
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    for colour, variable in CSS_COLOURS.items():
        text = text.replace(colour, variable)
    return text


def swatch(look: plots.Look) -> Markup:
    """A method's line and marker, for the page's legend."""
    figure = Figure(figsize=(0.5, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot(
        [0, 1, 2], [0, 0, 0], color=look.colour, linestyle=look.dash, marker=look.marker, markevery=[1], linewidth=1.8
    )
    axes.set_xlim(0.05, 1.95)
    figure.patch.set_alpha(0)
    return svg(figure, f"{look.title}: line and marker")

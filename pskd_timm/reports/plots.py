"""Pictures of runs: each function draws one matplotlib Figure of what the methods' runs predicted or logged.

`tables` are, for each method, its runs' predictions: frames with the columns of predictions.parquet.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..methods import METHOD_SECTIONS
from ..metrics import ECE_BINS, bin_of, risk_curve
from .trials import DONE, STOPPED, searched

COLOURS = {name: section.colour for name, section in METHOD_SECTIONS.items()}
TITLES = {name: section.title for name, section in METHOD_SECTIONS.items()}
# Never colour alone: a dash and a marker a method, more of them for a method that ran with several settings.
DASHES = [
    "solid",
    (0, (5, 2)),
    (0, (1.2, 1.6)),
    (0, (5, 1.5, 1.2, 1.5)),
    (0, (8, 1.5)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
]
MARKERS = ["o", "s", "^", "D", "P", "X", "v", "*", "<", ">"]
INK, MUTED, GRID = "#1a1a1b", "#6b6b6c", "#e4e4e5"  # a page with a dark side puts its own in their place
MOST_POINTS = 300  # of a curve
SMALL_BIN = 0.01  # part of the samples below which a bin's accuracy is mostly chance
MOST_NAMES, LONGEST_NAME = 8, 20  # lines and letters that find room beside a plot
NAME_HEIGHT = 0.075  # of the plot's height
SIZE = (4.6, 3.3)  # inches of one picture
TRIAL_LABELS = {"nll": "NLL", "ece": "ECE %", "top1_error": "top-1 error %"}


class Look(NamedTuple):
    """How a method appears everywhere."""

    title: str
    colour: str
    dash: str | tuple
    marker: str


def title(method: str) -> str:
    """What a method is called; settings after its name (`pskd pskd.alpha=0.5`) stay."""
    name, _, settings = method.partition(" ")
    return f"{TITLES[name]} {settings}".rstrip()


def looks(methods) -> dict[str, Look]:
    """The look of each method; those of one name share its colour and differ in dash and marker."""
    found, order = {}, list(COLOURS)
    for method in methods:
        name = method.partition(" ")[0]
        place = order.index(name)
        while (DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]) in {
            (look.dash, look.marker) for look in found.values() if look.colour == COLOURS[name]
        }:
            place += 1
        found[method] = Look(title(method), COLOURS[name], DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)])
    return found


def _axes(axes: Axes | None, heading: str, xlabel: str, ylabel: str, size=SIZE) -> Axes:
    """Axes with this package's typography, in a Figure of their own where none are given (not pyplot's: no global state)."""
    axes = axes or Figure(figsize=size, layout="constrained").subplots()
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.patch.set_alpha(0)
    axes.figure.patch.set_alpha(0)
    return axes


def _line(axes: Axes, x, y, look: Look, every: int = 1):
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.8,
        marker=look.marker,
        markersize=4.5,
        markevery=every,
        label=look.title,
    )


def _legend(axes: Axes, wanted: bool, **where):
    if wanted:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=3, **where)


def _names_at_ends(axes: Axes, x: float, ends: dict[Look, float]):
    """Each line's name to the right of the axes, at its end (x, y) or as near as the names' height allows."""
    low, high = axes.get_ylim()
    lines = sorted((min(max((y - low) / (high - low), 0), 1), look) for look, y in ends.items())
    for at, (end, look) in zip(spread([end for end, _ in lines], NAME_HEIGHT), lines, strict=True):
        joint = {"arrowstyle": "-", "color": look.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(look.title, (x, end), (1.03, at), va="center", fontsize=8.5, color=INK, arrowprops=joint, **place)


def spread(places: list[float], apart: float) -> list[float]:
    """Rising `places` in [0, 1], moved as little as this takes to be `apart` from each other."""
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        # Blocks that meet become one around the mean of what they hold.
        while len(blocks) > 1 and _lowest(blocks[-1], apart) < _lowest(blocks[-2], apart) + apart * len(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_lowest(block, apart) + apart * i for block in blocks for i in range(len(block))]


def _lowest(block: list[float], apart: float) -> float:
    """Where the first of a block's places lies: around their mean, inside [0, 1] where there is room."""
    length = apart * (len(block) - 1)
    return max(0.0, min(sum(block) / len(block) - length / 2, 1 - length))


def _thinned(length: int) -> np.ndarray:
    """At most MOST_POINTS of 0 … length − 1, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, MOST_POINTS)).round().astype(int))


def curves(
    history: pd.DataFrame,
    metric: str,
    heading: str = "",
    axes: Axes | None = None,
    legend: bool = True,
    names: bool = False,
) -> Figure:
    """`metric` over the epochs: mean ± standard deviation over seeds; `history` has method, seed, epoch and `metric`.

    The frame is that of the last 60 % of the epochs, where the methods part. `names` puts the methods' names, where they
    are few and short, at the ends of their lines.
    """
    axes, ends = _axes(axes, heading or metric, "epoch", ""), {}
    for i, (method, look) in enumerate(looks(history.method.unique()).items()):
        by_epoch = history[history.method == method].groupby("epoch")[metric]
        mean, std = by_epoch.mean(), by_epoch.std().fillna(0.0)
        kept = _thinned(len(mean))
        epochs, mean, std = mean.index.to_numpy()[kept], mean.to_numpy()[kept], std.to_numpy()[kept]
        axes.fill_between(epochs, mean - std, mean + std, color=look.colour, alpha=0.1, linewidth=0)
        apart = max(1, len(kept) // 6)
        _line(axes, epochs, mean, look, (i * apart // 5 % len(kept), apart))
        ends[look] = mean[-1]
    late = history[history.epoch > 0.4 * history.epoch.max()].groupby(["method", "epoch"])[metric].mean()
    axes.set_ylim(max(0, 0.8 * late.min()), 1.1 * late.max() or 1)  # the first epochs may leave by the top
    first, last = history.epoch.min(), history.epoch.max()
    margin = 0.02 * (max(last, 2) - first)  # for the outermost markers
    axes.set_xlim(first - margin, max(last, 2) + margin)
    if names and len(ends) <= MOST_NAMES and max(len(look.title) for look in ends) <= LONGEST_NAME:
        _names_at_ends(axes, last, ends)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(axes, legend)
    return axes.figure


def reliability(tables: dict[str, list[pd.DataFrame]], axes: Axes | None = None, legend: bool = True) -> Figure:
    """Accuracy against mean confidence in each of ECE's bins, pooled over a method's runs; hollow where under 1 % lie."""
    axes = _axes(axes, "Reliability", f"confidence (mean of each of {ECE_BINS} bins)", "accuracy")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    axes.annotate("confidence = accuracy", (0.98, 0.03), color=MUTED, fontsize=8, ha="right")
    for method, look in looks(tables).items():
        pooled = pd.concat([table[["confidence", "correct"]] for table in tables[method]])
        bins = pooled.groupby(bin_of(torch.tensor(pooled.confidence.to_numpy())).numpy())
        of_bin, few = bins.mean(), bins.size() < SMALL_BIN * len(pooled)
        _line(axes, of_bin.confidence[~few], of_bin.correct[~few], look)
        hollow = {"color": look.colour, "marker": look.marker, "markersize": 4.5, "markerfacecolor": "none"}
        axes.plot(of_bin.confidence[few], of_bin.correct[few], linestyle="none", **hollow)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _legend(axes, legend, loc="upper left")
    return axes.figure


def risk_coverage(tables: dict[str, list[pd.DataFrame]], axes: Axes | None = None, legend: bool = True) -> Figure:
    """Error among the most confident share of the samples against that share, mean over a method's runs."""
    axes = _axes(axes, "Risk and coverage", "coverage: most confident share of the samples, %", "error among them, %")
    for i, (method, look) in enumerate(looks(tables).items()):
        each = [
            risk_curve(torch.tensor(table.confidence.to_numpy()), torch.tensor(table.correct.to_numpy())).numpy()
            for table in tables[method]
        ]
        kept = _thinned(len(each[0]))
        risk = 100 * np.mean(each, axis=0)[kept]
        apart = max(1, len(kept) // 6)
        _line(axes, 100 * (kept + 1) / len(each[0]), risk, look, (i * apart // 5 % len(kept), apart))
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    _legend(axes, legend, loc="upper left")
    return axes.figure


def confidence_histogram(tables: list[pd.DataFrame], look: Look, axes: Axes | None = None, bins: int = 20) -> Figure:
    """Share of the samples by confidence, right ones and wrong ones, pooled over one method's runs."""
    axes = _axes(axes, look.title, "confidence", "samples, %", (3.1, 2.5))
    axes.set_title(look.title, loc="left", pad=19, fontsize=10.5, color=INK, fontweight="bold")  # room for a line below
    pooled = pd.concat([table[["confidence", "correct"]] for table in tables])
    edges = np.linspace(0, 1, bins + 1)
    right, wrong = (
        100 * np.histogram(pooled.confidence[pooled.correct == hit], edges)[0] / len(pooled) for hit in (True, False)
    )
    place = {"x": edges[:-1], "width": 0.92 / bins, "align": "edge"}
    axes.bar(height=right, color=look.colour, alpha=0.85, label="right", **place)
    axes.bar(
        height=wrong,
        bottom=right,
        color="none",
        edgecolor=look.colour,
        hatch="/////",
        linewidth=0.8,
        label="wrong",
        **place,
    )
    confidence, accuracy = pooled.confidence.mean(), pooled.correct.mean()
    axes.axvline(confidence, color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)))
    axes.axvline(accuracy, color=INK, linewidth=1.2)
    axes.set_xlim(0, 1)
    told = f"confidence {confidence:.3f} (dashed), accuracy {accuracy:.3f} (line)"
    axes.text(0, 1.04, told, transform=axes.transAxes, fontsize=7.5, color=INK)
    return axes.figure


def per_class_error(
    tables: dict[str, list[pd.DataFrame]], class_names: list[str], most: int = 20, legend: bool = True
) -> Figure:
    """Error of each class, mean over a method's runs; of many classes the `most` with the largest mean over methods."""
    errors = pd.DataFrame({method: class_errors(each) for method, each in tables.items()})
    shown = errors.loc[errors.mean(axis=1).sort_values(ascending=False).index[:most]][::-1]
    heading = (
        "Error by class" if len(shown) == len(errors) else f"Error by class: the hardest {len(shown)} of {len(errors)}"
    )
    axes = _axes(None, heading, "error, %", "", (SIZE[0], 0.9 + 0.24 * len(shown)))
    place = np.arange(len(shown))
    for i, (method, look) in enumerate(looks(tables).items()):
        shift = 0.5 * ((i + 0.5) / len(tables) - 0.5)
        style = {"color": look.colour, "marker": look.marker, "markersize": 5, "linestyle": "none", "label": look.title}
        axes.plot(shown[method], place - shift, **style)
    axes.set_yticks(place, [cut(class_names[k]).replace("$", r"\$") for k in shown.index])
    axes.grid(axis="y", visible=False)
    for at in place[:-1]:
        axes.axhline(at + 0.5, color=GRID, linewidth=0.8)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.set_ylim(-0.5, len(shown) - 0.5)
    _legend(axes, legend, loc="lower right")
    return axes.figure


def cut(name: str, most: int = 24) -> str:
    """A name of at most so many letters; a longer one ends in `…`."""
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def class_errors(tables: list[pd.DataFrame]) -> pd.Series:
    """Error in % of each class in the labels, mean over the runs."""
    each = [100 * (1 - table.correct.astype(float)).groupby(table.label.to_numpy()).mean() for table in tables]
    return pd.concat(each, axis=1).mean(axis=1)


def trials(
    table: pd.DataFrame,
    key: str,
    metric: str,
    chosen_by: str,
    method: str,
    axes: Axes | None = None,
    legend: bool = True,
) -> Figure:
    """A figure on the held-out part against the searched setting `key`, a point a trial of a search of `method`.

    `table` is trials.csv; the trial with the lowest `chosen_by` is circled, and bars are standard deviations over seeds.
    """
    axes = _axes(axes, "", key, f"{TRIAL_LABELS[metric]} (held out)", (3.6, 2.7))
    done, stopped = table[table.state == DONE].sort_values(key), table[table.state == STOPPED]
    is_number = pd.api.types.is_numeric_dtype(table[key])
    look = looks([method])[method]
    # With a second setting that changes too, a line from trial to trial would show nothing.
    line = "-" if is_number and searched(table) == [key] else "none"
    style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linestyle": line, "capsize": 3}
    axes.errorbar(done[key], done[metric], yerr=done.get(f"{metric}_std"), label="finished", **style)
    if len(stopped):
        axes.plot(stopped[key], stopped[metric], "x", color=MUTED, label="stopped early")
    if len(done):
        best = done.loc[[done[chosen_by].idxmin()]]
        axes.plot(best[key], best[metric], "o", markersize=11, fillstyle="none", color=INK, label="chosen")
    if is_number and table[key].min() > 0 and table[key].max() / table[key].min() >= 10:
        axes.set_xscale("log")
    _legend(axes, legend)
    return axes.figure


def search(table: pd.DataFrame, chosen_by: str, method: str) -> Figure:
    """One picture of a search: a row a searched setting, with NLL, ECE and top-1 error against it."""
    keys = searched(table)
    figure = Figure(figsize=(11, 3.2 * len(keys)), layout="constrained")
    for row, key in zip(figure.subplots(len(keys), len(TRIAL_LABELS), squeeze=False), keys, strict=True):
        for axes, metric in zip(row, TRIAL_LABELS, strict=True):
            trials(table, key, metric, chosen_by, method, axes, legend=False)
    figure.patch.set_alpha(1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return figure


def reliability_and_risk(tables: dict[str, list[pd.DataFrame]]) -> Figure:
    """Reliability beside risk and coverage, in one picture."""
    figure = Figure(figsize=(9.4, 4), layout="constrained")
    reliable, risk = figure.subplots(1, 2)
    reliability(tables, reliable)
    risk_coverage(tables, risk, legend=False)
    figure.patch.set_alpha(1)
    return figure


def comparison(history: pd.DataFrame, tables: dict[str, list[pd.DataFrame]], heading: str) -> Figure:
    """One picture of a comparison: the error over the epochs, reliability, risk and coverage."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    error, reliable, risk = figure.subplots(1, 3)
    curves(history, "top1_error", "top-1 error, %", axes=error, legend=False)
    reliability(tables, reliable, legend=False)
    risk_coverage(tables, risk, legend=False)
    figure.patch.set_alpha(1)
    handles, labels = error.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3.5)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12)
    return figure

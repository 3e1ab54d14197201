"""Pictures of runs: each function draws one matplotlib Figure of what the methods' runs predicted or logged.

`tables` are, for each method, its runs' predictions: frames with the columns of predictions.parquet.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from scipy.optimize import isotonic_regression

from ..methods import METHOD_SECTIONS
from ..metrics import ECE_BINS, METRICS, Metric, reliability_bins, risk_curve, thinned
from .trials import DONE, STOPPED, best_trial, searched, shown_in_search

COLOURS = {name: section.colour for name, section in METHOD_SECTIONS.items()}
TITLES = {name: section.title for name, section in METHOD_SECTIONS.items()}
SCALED = "baseline+temperature"  # no method: the baseline's runs after temperature scaling
SCALED_COLOUR = "#8C8C8C"
# Of names that are no method's, such as a detector's backbone: none of a method's colours, whichever stand beside them.
OTHER_COLOURS = ["#0072B2", "#CC79A7", "#7FA800", "#A0522D", "#00AFAF"]
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
FEW = 10  # samples below which an error of a class is mostly chance
SMALL_BIN = 0.01  # part of the samples below which a bin's accuracy is mostly chance
MOST_NAMES, LONGEST_NAME = 12, 20  # lines and letters that find room beside a plot
NAME_HEIGHT = 0.075  # of the plot's height
LETTERS_ABOVE = 25  # of a title that find room above a small plot
LETTER = 0.072  # inches of width
SIZE = (4.6, 3.3)  # inches of one picture
LEGEND_ENTRY, LEGEND_LETTER = (
    1.1,
    0.1,
)  # inches in the legend below several pictures: without its name, a letter of that


class Look(NamedTuple):
    """How a method appears everywhere."""

    title: str
    colour: str
    dash: str | tuple
    marker: str


def title(method: str) -> str:
    """What a method is called; settings after its name (`pskd pskd.alpha=0.5`) stay."""
    name, _, settings = method.partition(" ")
    named = f"{TITLES['baseline']} + temperature" if name == SCALED else TITLES.get(name, name)
    return f"{named} {settings}".rstrip()


def looks(methods) -> dict[str, Look]:
    """The look of each method; those of one name share its colour and differ in dash and marker.

    What is no method's name, as that of a detector's backbone, takes the OTHER_COLOURS in their order.
    """
    methods, found, known = list(methods), {}, COLOURS | {SCALED: SCALED_COLOUR}
    order = list(dict.fromkeys([*known, *(method.partition(" ")[0] for method in methods)]))
    for method in methods:
        place = order.index(name := method.partition(" ")[0])
        colour = known.get(name) or OTHER_COLOURS[(place - len(known)) % len(OTHER_COLOURS)]
        while (DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]) in {
            (look.dash, look.marker) for look in found.values() if look.colour == colour
        }:
            place += 1
        found[method] = Look(title(method), colour, DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)])
    return found


def plain(text: str) -> str:
    """Words as matplotlib is to write them: a dollar sign is one, and begins no formula."""
    return text.replace("$", r"\$")


def _axes(axes: Axes | None, heading: str, xlabel: str, ylabel: str, size=SIZE, above=0.32, right=0.12) -> Axes:
    """Axes with this package's typography, in a Figure of their own where none are given (not pyplot's: no global state).

    `size` is the figure's, `above` and `right` of the axes is so much room, all in inches.
    """
    axes = axes or _own_axes(*size, left=0.68 if ylabel else 0.52, below=0.52, above=above, right=right)
    axes.set_title(plain(heading), loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.set_xlabel(plain(xlabel), fontsize=9, color=MUTED)
    axes.set_ylabel(plain(ylabel), fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.patch.set_alpha(0)
    axes.figure.patch.set_alpha(0)
    return axes


def _own_axes(width: float, height: float, left: float, below: float, above: float, right: float) -> Axes:
    """Axes with room for their labels around them: matplotlib's own layout would draw everything twice to find it."""
    place = left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height
    return Figure(figsize=(width, height)).add_axes(place)


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
        label=plain(look.title),
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
        joint["relpos"] = (0, 0.5)  # to where the name begins, not across it
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(
            plain(look.title), (x, end), (1.03, at), va="center", fontsize=8.5, color=INK, arrowprops=joint, **place
        )


def spread(places: list[float], apart: float) -> list[float]:
    """Rising `places` in [0, 1], moved as little as this takes (least squares) to be `apart` from each other."""
    shift = apart * np.arange(len(places))
    # Without their distances the places have only to rise; inside [0, 1] where there is room.
    rising = isotonic_regression(np.array(places) - shift).x
    return (rising.clip(0, max(0, 1 - shift[-1])) + shift).tolist()


def curves(
    history: pd.DataFrame,
    metric: str,
    heading: str = "",
    axes: Axes | None = None,
    legend: bool = True,
    names: bool = False,
    higher_is_better: bool = False,
) -> Figure:
    """`metric` over the epochs: mean ± standard deviation over seeds; `history` has method, seed, epoch and `metric`.

    The frame is that of the last 60 % of the epochs, where the methods part. `names` puts the methods' names, where they
    are few and short, at the ends of their lines.
    """
    found, ends = looks(history.method.unique()), {}
    longest = max(len(look.title) for look in found.values())
    names = names and len(found) <= MOST_NAMES and longest <= LONGEST_NAME
    axes = _axes(axes, heading or metric, "epoch", "", right=0.2 + LETTER * longest if names else 0.12)
    for i, (method, look) in enumerate(found.items()):
        by_epoch = history[history.method == method].groupby("epoch")[metric]
        mean, std = by_epoch.mean(), by_epoch.std().fillna(0.0)
        kept = thinned(len(mean), MOST_POINTS)
        epochs, mean, std = mean.index.to_numpy()[kept], mean.to_numpy()[kept], std.to_numpy()[kept]
        axes.fill_between(epochs, mean - std, mean + std, color=look.colour, alpha=0.1, linewidth=0)
        apart = max(1, len(kept) // 6)
        _line(axes, epochs, mean, look, (i * apart // 5 % len(kept), apart))
        ends[look] = mean[-1]
    late = history[history.epoch > 0.4 * history.epoch.max()].groupby(["method", "epoch"])[metric].mean()
    axes.set_ylim(*_frame(late.min(), late.max(), higher_is_better))  # the first epochs may leave it
    first, last = history.epoch.min(), history.epoch.max()
    margin = 0.02 * (max(last, 2) - first or 1)  # for the outermost markers
    axes.set_xlim(first - margin, max(last, 2) + margin)
    if names:
        _names_at_ends(axes, last, ends)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(axes, legend)
    return axes.figure


def _frame(low: float, high: float, higher_is_better: bool) -> tuple[float, float]:
    """Bottom and top of a plot of values between `low` and `high`: towards 0, which is best, or around them.

    Only values below 0 take it there.
    """
    if higher_is_better or low < 0:
        margin = 0.15 * (high - low) or 1
        return (low - margin if low < 0 else max(0, low - margin)), high + margin
    return max(0, 0.8 * low), 1.1 * high or 1


def reliability(tables: dict[str, list[pd.DataFrame]], axes: Axes | None = None, legend: bool = True) -> Figure:
    """Accuracy against mean confidence in each of ECE's bins, pooled over a method's runs; hollow where under 1 % lie."""
    axes = _axes(axes, "Reliability", f"confidence (mean of each of {ECE_BINS} bins)", "accuracy")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    axes.annotate("confidence = accuracy", (0.98, 0.03), color=MUTED, fontsize=8, ha="right")
    for method, look in looks(tables).items():
        pooled = pd.concat([table[["confidence", "correct"]] for table in tables[method]])
        bins = reliability_bins(pooled.confidence.to_numpy(), pooled.correct.to_numpy(bool))
        many, few = bins.fraction >= SMALL_BIN, (bins.fraction > 0) & (bins.fraction < SMALL_BIN)
        _line(axes, bins.confidence[many], bins.accuracy[many], look)
        hollow = {"color": look.colour, "marker": look.marker, "markersize": 4.5, "markerfacecolor": "none"}
        axes.plot(bins.confidence[few], bins.accuracy[few], linestyle="none", **hollow)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _legend(axes, legend, loc="upper left")
    return axes.figure


def risk_coverage(tables: dict[str, list[pd.DataFrame]], axes: Axes | None = None, legend: bool = True) -> Figure:
    """Error among the most confident share of the samples against that share, mean over a method's runs."""
    axes = _axes(axes, "Risk and coverage", "coverage: most confident share of the samples, %", "error among them, %")
    for i, (method, look) in enumerate(looks(tables).items()):
        each = [risk_curve(table.confidence.to_numpy(), table.correct.to_numpy(bool)) for table in tables[method]]
        kept = thinned(len(each[0]), MOST_POINTS)
        risk = 100 * np.mean(each, axis=0)[kept]
        apart = max(1, len(kept) // 6)
        _line(axes, 100 * (kept + 1) / len(each[0]), risk, look, (i * apart // 5 % len(kept), apart))
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    _legend(axes, legend, loc="upper left")
    return axes.figure


def precision_recall(curves: dict[str, list[np.ndarray]], heading: str, axes: Axes | None = None, size=SIZE) -> Figure:
    """Precision against recall, mean over a method's runs: `curves` has a precision [P] a run, at P even points of recall."""
    axes = _axes(axes, heading, "recall", "precision", size)
    for i, (method, look) in enumerate(looks(curves).items()):
        precision = np.mean(curves[method], axis=0)
        apart = max(1, len(precision) // 6)
        _line(axes, np.linspace(0, 1, len(precision)), precision, look, (i * apart // 5, apart))
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return axes.figure


def confidence_histogram(
    tables: list[pd.DataFrame], look: Look, axes: Axes | None = None, bins: int = 20, counted: str = "samples"
) -> Figure:
    """Share of the samples (or what `counted` names) by confidence, right and wrong ones, pooled over one method's runs."""
    axes = _axes(axes, look.title, "confidence", f"{counted}, %", (3.1, 2.5), above=0.5)
    # A long name in smaller letters; and room for a line below.
    size = max(7.0, 10.5 * min(1.0, LETTERS_ABOVE / len(look.title)))
    name = cut(look.title, int(10.5 / size * LETTERS_ABOVE))
    axes.set_title(plain(name), loc="left", pad=19, fontsize=size, color=INK, fontweight="bold")
    pooled = pd.concat([table[["confidence", "correct"]] for table in tables])
    edges = np.linspace(0, 1, bins + 1)
    right, wrong = (
        100 * np.histogram(pooled.confidence[pooled.correct == hit], edges)[0] / max(len(pooled), 1)
        for hit in (True, False)
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
    means = f"confidence {confidence:.3f} (dashed), accuracy {accuracy:.3f} (line)"
    axes.text(1.02, 1.04, means, transform=axes.transAxes, fontsize=7.5, color=INK, ha="right")
    return axes.figure


def per_class_error(
    tables: dict[str, list[pd.DataFrame]], class_names: list[str], most: int = 20, legend: bool = True
) -> Figure:
    """Error of each class, mean over a method's runs; of many classes the `most` with the largest mean over methods.

    Classes with fewer than FEW samples are not among these where there are enough others: their errors are chance.
    """
    errors = pd.DataFrame({method: class_errors(each) for method, each in tables.items()})
    counts = next(iter(tables.values()))[0].label.value_counts()
    frequent = errors[counts.reindex(errors.index) >= FEW]
    chosen = frequent if len(frequent) >= most else errors
    shown = chosen.loc[chosen.mean(axis=1).sort_values(ascending=False).index[:most]][::-1]
    heading = "Error by class"
    if len(shown) < len(errors):
        heading += f": the hardest {len(shown)} of {len(chosen)}" if len(shown) < len(chosen) else f": the {len(shown)}"
        heading += f" with at least {FEW} samples" if len(chosen) < len(errors) else ""
    return by_class(shown.rename(index=dict(enumerate(class_names))), heading, "error, %", legend)


def by_class(shown: pd.DataFrame, heading: str, xlabel: str, legend: bool = True) -> Figure:
    """A figure of each class: `shown` has a row a class, from below, and a column a method."""
    # Names are as wide as they are: here matplotlib has to find the room.
    own = Figure(figsize=(SIZE[0], 0.9 + 0.24 * len(shown)), layout="constrained").subplots()
    axes = _axes(own, heading, xlabel, "")
    place = np.arange(len(shown))
    for i, (method, look) in enumerate(looks(shown).items()):
        shift = 0.5 * ((i + 0.5) / len(shown.columns) - 0.5)
        style = {
            "color": look.colour,
            "marker": look.marker,
            "markersize": 5,
            "linestyle": "none",
            "label": plain(look.title),
        }
        axes.plot(shown[method], place - shift, **style)
    axes.set_yticks(place, [plain(cut(name)) for name in shown.index])
    axes.grid(axis="y", visible=False)
    for at in place[:-1]:
        axes.axhline(at + 0.5, color=GRID, linewidth=0.8)
    left, right = axes.get_xlim()
    axes.set_xlim((min(0, left), right) if shown.to_numpy().any() else (0, 1))
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
    metric: Metric,
    chosen_by: Metric,
    method: str,
    axes: Axes | None = None,
    legend: bool = True,
    joined: bool = True,
) -> Figure:
    """A metric on the held-out part against the searched setting `key`, a point a trial of a search of `method`.

    `table` is trials.csv; the trial with the best `chosen_by` is circled, and bars are standard deviations over seeds.
    `joined` draws a line through the trials.
    """
    axes = _axes(axes, "", key, f"{metric.header} (held out)", (3.6, 2.7), above=0.12)
    done, stopped = table[table.state == DONE].sort_values(key), table[table.state == STOPPED]
    is_number = pd.api.types.is_numeric_dtype(table[key])
    look = looks([method])[method]
    line = "-" if is_number and joined else "none"
    style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linestyle": line, "capsize": 3}
    axes.errorbar(done[key], done[metric.name], yerr=done.get(f"{metric.name}_std"), label="finished", **style)
    if len(stopped):
        axes.plot(stopped[key], stopped[metric.name], "x", color=MUTED, label="stopped early")
    if (best := best_trial(table, chosen_by)) is not None:
        axes.plot(best[key], best[metric.name], "o", markersize=11, fillstyle="none", color=INK, label="chosen")
    if is_number and table[key].min() > 0 and table[key].max() / table[key].min() >= 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes, legend)
    return axes.figure


def differences(table: pd.DataFrame, key: str, metric: Metric, axes: Axes | None = None, legend: bool = True) -> Figure:
    """Differences to the baseline in `metric` against the setting `key`: a point a run, a line through the means of a method.

    `table` has the columns value, method, seed and the metric's.
    """
    axes = _axes(axes, metric.header, key, "", (3.6, 2.7))
    axes.axhline(0, color=INK, linewidth=1)
    for method, look in looks(table.method.unique()).items():
        of_method = table[table.method == method]
        mean = of_method.groupby("value")[metric.name].mean()
        axes.plot(of_method.value, of_method[metric.name], ".", color=look.colour, alpha=0.5, markersize=5)
        _line(axes, mean.index.to_numpy(), mean.to_numpy(), look)
    values = np.sort(table.value.unique())
    if values[0] > 0 and values[-1] / values[0] >= 10:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values])
    _legend(axes, legend)
    return axes.figure


def by_setting(table: pd.DataFrame, key: str, metrics: Sequence[Metric]) -> Figure:
    """One picture of `differences` in each of the `metrics`."""
    figure = Figure(figsize=(3.3 * len(metrics), 3.6), layout="constrained")
    each = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(each, metrics, strict=True):
        differences(table, key, metric, axes, legend=False)
    figure.patch.set_alpha(1)
    legend_below(figure, each[:1])
    figure.suptitle(f"Difference to the baseline by {plain(key)}", x=0.01, ha="left", fontsize=12)
    return figure


def search(
    table: pd.DataFrame, chosen_by: str, method: str, metrics: Sequence[Metric] = tuple(METRICS.values())
) -> Figure:
    """One picture of a search that ranks by the metric named `chosen_by`: a row a searched setting, with each metric
    against it."""
    keys, shown = searched(table, metrics), shown_in_search(metrics)
    by = next(metric for metric in metrics if metric.name == chosen_by)
    figure = Figure(figsize=(11, 3.2 * len(keys)), layout="constrained")
    for row, key in zip(figure.subplots(len(keys), len(shown), squeeze=False), keys, strict=True):
        for axes, metric in zip(row, shown, strict=True):
            # With a second setting that changes too, a line from trial to trial would show nothing.
            trials(table, key, metric, by, method, axes, legend=False, joined=len(keys) == 1)
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


def legend_below(figure: Figure, each: Iterable[Axes]):
    """One legend of what stands in any of the axes, in as many rows as it takes."""
    drawn = [pair for axes in each for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    length = sum(LEGEND_ENTRY + LEGEND_LETTER * len(label) for label in handles)
    rows = max(1, math.ceil(length / figure.get_figwidth()))
    figure.set_figheight(figure.get_figheight() + 0.22 * (rows - 1))
    columns = math.ceil(len(handles) / rows)
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles.values(), handles, frameon=False, handlelength=3.5, **place)


def comparison(
    history: pd.DataFrame, tables: dict[str, list[pd.DataFrame]], heading: str, metric: Metric = METRICS["top1_error"]
) -> Figure:
    """One picture of a comparison: a metric over the epochs and, where predictions were kept, reliability and risk."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    first, reliable, risk = figure.subplots(1, 3)
    higher = metric.higher_is_better
    curves(history, metric.name, metric.header, axes=first, legend=False, higher_is_better=higher)
    reliability(tables, reliable, legend=False)
    risk_coverage(tables, risk, legend=False)
    figure.patch.set_alpha(1)
    legend_below(figure, (reliable, first))
    figure.suptitle(plain(heading), x=0.01, ha="left", fontsize=12)
    return figure

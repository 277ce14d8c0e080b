"""Pictures of what the cache did, step by step: hits, time, bytes."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from torchcache.counters import Point
from torchcache.errors import TorchcacheError
from torchcache.quantity import size_text
from torchcache.reports.stats import RegionStats, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
BINS = 120
INCHES = (6.0, 7.5)


def plot(target: Any, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw hits, time and bytes over the steps, one column a region; needs matplotlib.

    Parameters
    ----------
    target : nn.Module or marked function
        What ``transform`` or ``torch.compile`` returned, a marked module, or a decorated function.
    path : str, Path or None
        Where the picture is saved, in the format that its suffix names; ``None`` saves nothing.

    Returns
    -------
    matplotlib.figure.Figure
        The picture, which a notebook shows where it is a cell's last value.

    Raises
    ------
    TorchcacheError
        When matplotlib is not installed, or nothing was looked up so far.
    TypeError
        For a target of another kind.
    """
    regions = [region for region in stats(target).regions if region.rows]
    if not regions:
        raise TorchcacheError("torchcache.plot: nothing was looked up so far; call it after some steps")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TorchcacheError(
            "torchcache.plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # a notebook shows figures of its own accord only if pyplot made them
            data = io.BytesIO()
            self.savefig(data, dpi=100)
            return data.getvalue()

    figure = Picture(figsize=(INCHES[0] * len(regions), INCHES[1]), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(regions), sharex="col", squeeze=False)
    for column, region in zip(axes.T, regions, strict=True):
        _draw(column, region)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw(axes: Any, region: RegionStats) -> None:
    points = _binned(region.history)
    steps = np.array([point.calls for point in points])
    spans = np.diff(steps)
    hits, times, sizes = axes
    rows = np.maximum(_gain(points, "rows"), 1)
    places = {"memory": ("from memory", BLUE), "disk": ("from disk", GREEN), "remote": ("from a server", PURPLE)}
    shares = {name: 100 * _gain(points, f"{name}_hits") / rows for name in places}
    kept = [name for name in places if name != "remote" or region.remote_hits]
    _stack(hits, steps, {places[name][0]: (shares[name], places[name][1]) for name in kept})
    if region.unloaded:
        unloaded = 100 * _gain(points, "unloaded") / rows
        hits.stairs(unloaded, steps, color=ORANGE, linewidth=1.5, label="samples not loaded")
    bypassed = f", {region.bypasses:,} more not cached" if region.bypasses else ""
    title = f"{region.name}\n{region.hit_rate:.0%} of {region.rows:,} rows were hits{bypassed}"
    hits.set_title(title, fontsize="medium", pad=26)  # above the legend
    hits.set_ylabel("hits, % of rows")
    hits.set_ylim(0, 105)
    parts = {"compute": ORANGE, "hash": BLUE, "lookup": GREEN, "merge": GREY, "audit": PURPLE}
    taken = {name: (1000 * _gain(points, f"{name}_seconds") / spans, colour) for name, colour in parts.items()}
    _stack(times, steps, taken)
    times.set_ylabel("time of a step, ms")
    _cut_peak(times, steps, sum(heights for heights, _ in taken.values()))
    for tier, label, colour, style in (("memory", "in memory", BLUE, "-"), ("disk", "written to disk", GREEN, "--")):
        held = np.array([getattr(point, f"{tier}_bytes") for point in points])
        if held[-1]:
            sizes.plot(steps, held, color=colour, linestyle=style, linewidth=2, label=f"{label}, {size_text(held[-1])}")
    sizes.set(ylabel="bytes of rows", xlabel="step", xlim=(0, steps[-1]))
    sizes.xaxis.get_major_locator().set_params(integer=True)
    sizes.set_ylim(bottom=0)
    sizes.yaxis.set_major_formatter(lambda value, _: size_text(value))
    for each in axes:
        each.grid(axis="y", color="0.9")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def _stack(axes: Axes, steps: Any, layers: dict[str, tuple[Any, str]]) -> None:
    """Layers on top of each other, each constant between two points; those without height are left out."""
    shown = {name: layer for name, layer in layers.items() if layer[0].any()}
    bottom = np.zeros(len(steps) - 1)
    for name, (heights, colour) in shown.items():
        axes.stairs(bottom + heights, steps, baseline=bottom, fill=True, color=colour, linewidth=0, label=name)
        bottom = bottom + heights


def _cut_peak(axes: Axes, steps: Any, heights: Any) -> None:
    """Keep one step far above all others, such as a first one that opens the disk, from flattening the rest."""
    if len(heights) < 3:
        return
    position = int(np.argmax(heights))
    second = np.delete(heights, position).max()
    if heights[position] > 3 * second > 0:
        axes.set_ylim(0, 1.3 * second)
        at = steps[position : position + 2].mean() / steps[-1]
        note = f"{heights[position]:.3g} ms"
        axes.text(at + 0.01, 0.99, note, transform=axes.transAxes, va="top", fontsize="small", color="0.3")


def _gain(points: list[Point], name: str) -> Any:
    return np.diff([float(getattr(point, name)) for point in points])


def _binned(history: tuple[Point, ...]) -> list[Point]:
    """The beginning, and at most ``BINS`` points after it."""
    start = Point(*[0] * len(Point._fields))
    last_of_call = {point.calls: point for point in history}
    points = [start, *last_of_call.values()]
    every = -(-(len(points) - 1) // BINS)
    kept = points[:0:-1][::every][::-1]
    return [start, *kept]

"""What the plots of an analysis are made of: their style, lines, axes, legends."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.dpi": 100.0,
    "savefig.dpi": 100.0,
    "svg.hashsalt": "halfstep",
}
FEW = 40  # points that are drawn one by one
MOST_POINTS = 1000  # of a line


def line(axes: Axes, steps: Sequence[float], values: Sequence[float], color: str, label: str, marker: str) -> None:
    """Draw values over steps; of many points the range in each of some hundred spans, and its median."""
    if len(steps) <= MOST_POINTS:
        style = {"marker": marker, "markersize": 5} if len(steps) <= FEW else {"linewidth": 1.0}
        axes.plot(steps, values, color=color, label=label, **style)
        return
    span = math.ceil(2 * len(steps) / MOST_POINTS)
    parts = [slice(i, i + span) for i in range(0, len(steps), span)]
    middles = [steps[part][len(steps[part]) // 2] for part in parts]
    lows, highs = ([choose(values[part]) for part in parts] for choose in (min, max))
    axes.fill_between(middles, lows, highs, color=color, alpha=0.3, linewidth=0)
    label += f": median and range of each {span} points"
    axes.plot(middles, [statistics.median(values[part]) for part in parts], color=color, linewidth=1.0, label=label)


def steps_axis(axes: Axes, first: float, last: float, margin: float = 0.02) -> None:
    """Make the x axis one of steps, from `first` to `last` and a share of their distance around."""
    if margin or first == last:
        pad = max(margin * (last - first), 0.5)
        first, last = first - pad, last + pad
    axes.set_xlim(first, last)
    axes.set_xlabel("step (update of the scaler)")
    whole_numbers(axes.xaxis)


def whole_numbers(axis: Any) -> None:
    """Have the axis count."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def powers_of_two(axes: Axes, low: float, high: float) -> None:
    """Make the y axis one of powers of two that holds both, with at most about seven ticks."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("log", base=2)
    first, last = math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 1
    apart = next(n for n in (1, 2, 4, 5, 10, 20, 50) if (last - first) / n <= 7)
    axes.set_ylim(2.0**first, 2.0**last)
    axes.yaxis.set_major_locator(FixedLocator([2.0**n for n in range(first, last + 1) if n % apart == 0]))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it can cover nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=6, handlelength=1.5, columnspacing=1.5)


def say(axes: Axes, reason: str) -> None:
    """Say in the empty plot that nothing was recorded, and why."""
    text = "\n".join(["Nothing was recorded:", *textwrap.wrap(reason, 80)]) if reason else "Nothing was recorded."
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#333333")
    axes.set_yticks([])
    if len(axes.get_shared_x_axes().get_siblings(axes)) == 1:  # else the parts above have their steps from here
        axes.tick_params(bottom=False, labelbottom=False)
    axes.grid(False)


def count(number: int, what: str) -> str:
    """Return such as "2 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """Return such as "12.5 %"."""
    return f"{100 * share:.1f} %"

"""A benchmark as one picture: speed-up and acceptance length per drafter and temperature, acceptance by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d")
STYLES = ("-", "--", ":", "-.")
HEIGHT = 0.26
"""Of a bar, in inches."""


def write_plot(results: dict, path: Path) -> bool:
    """`path` as PNG; False where matplotlib is not installed or there is nothing to draw.

    Acceptance by position is left out where there are more drafters than colours: nobody could tell the lines apart.
    """
    entries = [entry for entry in results["speed"] if entry["acceptance_at_position"]]
    if not entries:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    temperatures = list(dict.fromkeys(entry["temperature"] for entry in entries))
    names = list(dict.fromkeys(entry["arm"] for entry in entries))
    few = len(names) <= len(COLOURS)
    figure = Figure(figsize=(15, max(4.2, 1.2 + HEIGHT * (len(entries) + 0.6 * len(names)))), layout="constrained")
    speed, length, *position = figure.subplots(1, 3 if few else 2)
    length.sharey(speed)
    bars(speed, entries, names, temperatures, "speedup", "Decode speed-up over autoregressive")
    bars(length, entries, names, temperatures, "mean_acceptance_length", "Tokens per step, bonus included")
    length.tick_params(labelleft=False)
    if few:
        lines(position[0], entries, names, temperatures)
    for axes in (speed, length, *position):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    return True


def bars(
    axes: "Axes",
    entries: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    temperatures: Sequence[float],
    field: str,
    title: str,
) -> None:
    """A row per drafter, the first on top, with a bar per temperature; the line at 1 is autoregressive decoding."""
    for place, temperature in enumerate(temperatures):
        chosen = [entry for entry in entries if entry["temperature"] == temperature]
        height = 0.8 / len(temperatures)
        middles = [names.index(entry["arm"]) + (place - (len(temperatures) - 1) / 2) * height for entry in chosen]
        bar = axes.barh(
            middles,
            [entry[field] for entry in chosen],
            0.9 * height,
            color=COLOURS[place % len(COLOURS)],
            label=f"temperature {temperature:g}",
        )
        axes.bar_label(bar, fmt="%.2f", padding=2, fontsize=9)
    axes.axvline(1.0, color="0.35", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title)
    axes.margins(x=0.12)
    axes.grid(axis="x", color="0.9")


def lines(
    axes: "Axes", entries: Sequence[Mapping[str, Any]], names: Sequence[str], temperatures: Sequence[float]
) -> None:
    """How many of the draft tokens were accepted at least, a line per drafter and temperature."""
    for entry in entries:
        joint = entry["acceptance_at_position"]
        axes.plot(
            range(1, len(joint) + 1),
            joint,
            color=COLOURS[(names.index(entry["arm"]) + len(temperatures)) % len(COLOURS)],  # the first are bars
            linestyle=STYLES[temperatures.index(entry["temperature"]) % len(STYLES)],
            marker="o",
            label=f"{entry['arm']}, {entry['temperature']:g}",
        )
    axes.set(title="Draft tokens accepted: at least n", xlabel="n", ylabel="share of rounds", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)

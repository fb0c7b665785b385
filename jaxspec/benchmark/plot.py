"""A benchmark as one picture: speed-up and acceptance length per drafter and temperature, acceptance by position."""

from pathlib import Path

COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00beff", "#fb49b0", "#00b25d")
MARKERS = ("o", "s", "^", "D", "v", "P")


def write_plot(results: dict, path: Path) -> bool:
    """`path` as PNG; False where matplotlib is not installed or there is nothing to draw."""
    entries = [entry for entry in results["speed"] if entry["acceptance_at_position"]]
    if not entries:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return False
    temperatures = list(dict.fromkeys(entry["temperature"] for entry in entries))
    names = list(dict.fromkeys(entry["arm"] for entry in entries))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    speed, length, position = figure.subplots(1, 3)
    bars(speed, entries, names, temperatures, colour, "speedup", "Decode speed-up over autoregressive")
    bars(length, entries, names, temperatures, colour, "mean_acceptance_length", "Tokens per step, bonus included")
    for entry in entries:
        joint = entry["acceptance_at_position"]
        place = temperatures.index(entry["temperature"])
        position.plot(
            range(1, len(joint) + 1),
            joint,
            color=colour[entry["arm"]],
            linestyle=("-", "--", ":", "-.")[place % 4],
            marker=MARKERS[place % len(MARKERS)],
        )
    for place, temperature in enumerate(temperatures):
        style = {"linestyle": ("-", "--", ":", "-.")[place % 4], "marker": MARKERS[place % len(MARKERS)]}
        position.plot([], [], color="0.35", label=f"temperature {temperature:g}", **style)
    position.set(title="Draft tokens accepted: at least n", xlabel="n", ylabel="share of rounds", ylim=(0, 1.02))
    position.xaxis.get_major_locator().set_params(integer=True)
    position.legend(frameon=False)
    for axes in (speed, length, position):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    handles = [Patch(color=colour[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.savefig(path, dpi=130)
    return True


def bars(axes, entries, names, temperatures, colour, field: str, title: str) -> None:
    """A group of bars per temperature, in the order of `names`; the line at 1 is autoregressive decoding."""
    width = 0.8 / len(names)
    values = {(entry["arm"], entry["temperature"]): entry[field] for entry in entries}
    for group, temperature in enumerate(temperatures):
        present = [name for name in names if (name, temperature) in values]
        for place, name in enumerate(present):
            middle = group + (place - (len(present) - 1) / 2) * width
            bar = axes.bar(middle, values[name, temperature], 0.92 * width, color=colour[name])
            axes.bar_label(bar, fmt="%.2f", padding=2, fontsize=9)
    axes.axhline(1.0, color="0.35", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(temperatures)), [f"temperature {each:g}" for each in temperatures])
    axes.set_title(title)
    axes.margins(y=0.12)

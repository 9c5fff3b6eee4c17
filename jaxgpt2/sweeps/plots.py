"""A sweep's figures, from its table (a pandas DataFrame, as `jaxgpt2.sweeps.store.table` makes it).

All figures of this project have this style: a colour and a marker for each method, integers as integers, legends
outside, readable in grey and at half size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxgpt2 import methods
from weights.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One heat map for each method and width, and no more of them than fit on a page.
MOST_PANELS = 12

# Lightness tells them apart in grey. Methods that are not here take the rest, in order of their names.
LOOKS = {"softmax": ("#f2a33a", "o"), "lowrank": ("#0b3c6f", "s"), "polynomial": ("#2b8a67", "D")}
MORE_LOOKS = (("#7b3294", "^"), ("#a6611a", "v"), ("#c51b7d", "P"), ("#636363", "X"))
DASHES = ("-", "--", ":", "-.")

STYLE: dict[str, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.hashsalt": "jaxgpt2",
}

RECOVERED = "Recovered KL\n(1: as in float, 0: no head)"


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of all figures, while a figure is made and saved."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        yield


def looks(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method; more methods than colours share them."""
    others = sorted(set(methods) - set(LOOKS))
    return LOOKS | {name: MORE_LOOKS[number % len(MORE_LOOKS)] for number, name in enumerate(others)}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, as its name ends, whole or not at all. The same figure gives the same file."""
    kind = path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    write_atomically(path, lambda name: figure.savefig(name, format=kind, dpi=120, metadata=metadata))


def figures_of(frame: Any) -> dict[str, Figure]:
    """All figures that the rows allow, by name."""
    rows = frame[frame["error"].isna() & frame["recovered_kl"].notna()]
    if rows.empty:
        return {}
    figures = {"over_bits": over_bits(rows), "over_cost": over_cost(rows)}
    heads = rows[rows["head"].notna()]  # a whole attention has no place on a map of heads
    if not heads.empty:
        figures["over_heads"] = over_heads(heads)
    return figures


def draw(frame: Any, directory: Path, kind: str = "png") -> list[str]:
    """Draws what the rows allow; returns the names of the files."""
    with style():
        figures = {f"{name}.{kind}": figure for name, figure in figures_of(frame).items()}
        for name, figure in figures.items():
            save(figure, directory / name)
    return list(figures)


def formula_of(rows: Any) -> list[str]:
    """Columns that name a configuration, but for its widths: the method and its options."""
    options = dict.fromkeys(option for method in methods.names() for option in methods.get(method).options)
    return ["attention", *(option for option in options if option in rows.columns)]


def first_k(rows: Any) -> str:
    """The first k at which agreement was measured."""
    return next(name[4:] for name in rows.columns if name.startswith("top_") and name[4:].isdigit())


def label(values: Any, names: list[str], telling: set[str]) -> str:
    """`lowrank, score rank 16`, of a method and those of its options that tell configurations apart."""
    known = [(name, value) for name, value in zip(names, values, strict=True) if str(value) not in ("<NA>", "nan")]
    words = (f"{name.replace('_', ' ')} {value:g}" for name, value in known if name in telling)
    return ", ".join([short(str(known[0][1])), *words])


def short(method: str) -> str:
    """A method's name; of one from a file, `mine.py:name@digits`, the name alone."""
    return method.rpartition(":")[2].partition("@")[0]


def telling_of(rows: Any, names: list[str]) -> set[str]:
    """Options in which configurations of one method differ."""
    counts = rows.groupby("attention")[names[1:]].nunique()
    return {name for name in names[1:] if (counts[name] > 1).any()}


def mean_over(rows: Any) -> str:
    """What the points of a figure are."""
    count = len(rows.drop_duplicates(["layer", "head"]))
    return f"mean over {count} heads" if count > 1 else "one head"


def without_the_head(axes: Axes, value: float) -> None:
    """The line that every curve is to be compared with."""
    axes.axhline(value, color="black", linestyle=(0, (1, 1.5)), linewidth=1.8, label="without the head")


def limits(axes: Axes) -> tuple[float, float]:
    """Where recovered KL is drawn from and to: what is drawn, from -1 at most; always 0 and 1."""
    return min(-0.05, max(-1.05, axes.get_ylim()[0])), 1.05


def plain_logarithm(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with 0.5, 1, 2, 5, 10 on it, and room around the values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def over_bits(rows: Any) -> Figure:
    """Agreement over bits, as Zama 2023 draws it, and recovered KL beside it: means over heads."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    top, names = "top_" + first_k(rows), formula_of(rows)
    look, telling, drawn = looks(rows["attention"]), telling_of(rows, names), dict[str, int]()
    widths = rows["activation_bits"].nunique()
    for values, same in rows.groupby(names, dropna=False, sort=True):
        method = str(values[0])
        drawn[method] = drawn.get(method, -1) + 1
        (colour, marker), dashes = look[method], DASHES[drawn[method] % len(DASHES)]
        means = same.groupby("activation_bits")[[top, "recovered_kl"]].mean()
        looking: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": label(values, names, telling)}
        for axes, column in ((left, top), (right, "recovered_kl")):
            if len(means) == 1 < widths:  # a method that has the same bits always
                axes.axhline(float(means[column].iloc[0]), **looking)
            else:
                axes.plot(means.index.to_numpy(int), means[column].to_numpy(float), marker=marker, **looking)
    ablated = float(rows.drop_duplicates(["layer", "head"])[f"{top}_ablated"].mean())
    for axes, value in ((left, ablated), (right, 0.0)):
        without_the_head(axes, value)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Bits of activations")
    k = first_k(rows)
    left.set_ylabel("How often the best token\nis the float model's" if k == "1"
                    else f"How often the float model's best token\nis among the best {k}")  # fmt: skip
    right.set_ylabel(RECOVERED)
    right.set_ylim(*limits(right))
    figure.suptitle(mean_over(rows).capitalize(), fontsize=13)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, sum(drawn.values()) + 3))
    return figure


def over_heads(rows: Any) -> Figure:
    """Recovered KL of every head, a map for each method, in a row, and width (means over the method's options)."""
    from matplotlib.figure import Figure

    panels = list(rows.groupby(["attention", "activation_bits"], sort=True))[:MOST_PANELS]
    lines: list[list[Any]] = []
    for _, own in itertools.groupby(panels, lambda panel: panel[0][0]):
        of_method = list(own)
        lines += [of_method[start : start + 4] for start in range(0, len(of_method), 4)]
    down, across = len(lines), max(map(len, lines))
    figure = Figure(figsize=(2.9 * across + 1.2, 2.9 * down + 0.3), layout="constrained")
    image = None
    places = [
        (down, across, row * across + column + 1) for row, line in enumerate(lines) for column in range(len(line))
    ]
    for place, ((method, bits), same) in zip(places, panels, strict=True):
        axes = figure.add_subplot(*place)
        values = same.pivot_table(index="layer", columns="head", values="recovered_kl", aggfunc="mean")
        numbers = values.to_numpy(float)
        image = axes.imshow(numbers, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(len(values.columns)), [str(head) for head in values.columns])
        axes.set_yticks(range(len(values.index)), [str(layer) for layer in values.index])
        if numbers.size <= 16:  # more numbers could not be read
            for (row, column), value in {divmod(i, numbers.shape[1]): v for i, v in enumerate(numbers.flat)}.items():
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=11,
                          color="white" if value < 0.5 else "black")  # fmt: skip
        axes.set_title(f"{short(str(method))}, {bits} bits")
        axes.set_xlabel("Head")
        axes.set_ylabel("Layer")
    assert image is not None
    figure.colorbar(image, ax=figure.axes, extend="min", label="Recovered KL")
    return figure


def pareto(costs: Any, values: Any) -> list[int]:
    """Indices of the points that no other one beats in both, cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def over_cost(rows: Any) -> Figure:
    """Recovered KL over the estimated time of a token, encrypted: means over heads, for every configuration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    names = formula_of(rows)
    config = list(dict.fromkeys([*names, *(name for name in rows.columns if name.endswith("_bits"))]))
    seconds = "estimated_seconds_per_token"
    means = rows.groupby(config, dropna=False, sort=True)[[seconds, "recovered_kl"]].mean().reset_index()
    look = looks(rows["attention"])
    costs, values = means[seconds].to_numpy(float), means["recovered_kl"].to_numpy(float)
    front = pareto(costs, values)
    axes.plot(costs[front], values[front], color="#999999", linewidth=1.5, label="nothing better is cheaper", zorder=1)
    for method, same in means.groupby("attention", sort=True):
        colour, marker = look[str(method)]
        axes.scatter(same[seconds].to_numpy(float), same["recovered_kl"].to_numpy(float), s=55, color=colour,
                     marker=marker, label=short(str(method)), zorder=2)  # fmt: skip
        if same["activation_bits"].nunique() > 1:
            for _, point in same.iterrows():
                axes.annotate(f"{point['activation_bits']}", (point[seconds], point["recovered_kl"]), xytext=(6, -10),
                              textcoords="offset points", fontsize=10, color=colour, annotation_clip=True)  # fmt: skip
    without_the_head(axes, 0.0)
    plain_logarithm(axes, float(costs.min()), float(costs.max()))
    axes.set_ylim(*limits(axes))
    axes.set_xlabel(f"Estimated seconds for token {rows['seq_len'].iloc[0]} of a text, encrypted\n"
                    f"({'; '.join(rows['machine'].unique())})")  # fmt: skip
    axes.set_ylabel(RECOVERED)
    figure.suptitle(f"A point is a configuration, with its bits; {mean_over(rows)}", fontsize=13)
    figure.legend(loc="outside lower center", ncols=3)
    return figure

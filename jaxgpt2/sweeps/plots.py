"""A sweep's figures, from its table (a pandas DataFrame, as `jaxgpt2.sweeps.store.table` makes it)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One heat map for each method and width, and no more of them than fit on a page.
MOST_PANELS = 12


def draw(frame: Any, directory: Path) -> list[str]:
    """Draws what the rows allow; returns the names of the files."""
    rows = frame[frame["error"].isna() & frame["recovered_kl"].notna()]
    if rows.empty:
        return []
    figures = {"over_bits.png": over_bits(rows), "over_cost.png": over_cost(rows)}
    heads = rows[rows["head"].notna()]  # a whole attention has no place on a map of heads
    if not heads.empty:
        figures["over_heads.png"] = over_heads(heads)
    for name, figure in figures.items():
        write_atomically(directory / name, lambda path, figure=figure: figure.savefig(path, format="png", dpi=120))
    return list(figures)


def formula_of(rows: Any) -> list[str]:
    """Columns that name a configuration, but for its widths: the method and its options."""
    columns = list(rows.columns)
    first, last = columns.index("rounding_threshold_bits") + 1, columns.index("top_" + first_k(rows))
    return ["attention", *rows.columns[first:last]]


def first_k(rows: Any) -> str:
    """The first k at which agreement was measured."""
    return next(name[4:] for name in rows.columns if name.startswith("top_") and name[4:].isdigit())


def label(values: Any, names: list[str]) -> str:
    """`lowrank, score_rank 16`, of a method and the options that it has."""
    known = [(name, value) for name, value in zip(names, values, strict=True) if str(value) != "<NA>"]
    return ", ".join(str(value) if name == "attention" else f"{name} {value}" for name, value in known)


def over_bits(rows: Any) -> Figure:
    """Agreement over bits, as Zama 2023 draws it, and recovered KL beside it: means over heads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    top, names = "top_" + first_k(rows), formula_of(rows)
    for values, same in rows.groupby(names, dropna=False, sort=True):
        means = same.groupby("activation_bits")[[top, "recovered_kl"]].mean()
        for axes, column in ((left, top), (right, "recovered_kl")):
            axes.plot(means.index, means[column].to_numpy(float), marker="o", label=label(values, names))
    heads = rows.drop_duplicates(["layer", "head"])
    left.axhline(float(heads[f"{top}_ablated"].mean()), color="black", linestyle="--", label="without the head")
    right.axhline(0.0, color="black", linestyle="--", label="without the head")
    left.set_ylabel(f"top-{first_k(rows)} agreement with the float model")
    right.set_ylabel("recovered KL")
    right.set_ylim(max(-1.0, float(rows["recovered_kl"].min()) - 0.05), 1.05)
    for axes in (left, right):
        axes.set_xlabel("bits of activations")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.suptitle(f"mean over {len(heads)} heads")
    return figure


def over_heads(rows: Any) -> Figure:
    """Recovered KL of every head, a map for each method and width (means over the method's options)."""
    from matplotlib.figure import Figure

    panels = list(rows.groupby(["attention", "activation_bits"], sort=True))[:MOST_PANELS]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.2 * across + 1, 2.8 * down + 0.4), layout="constrained")
    image = None
    for number, ((method, bits), same) in enumerate(panels):
        axes = figure.add_subplot(down, across, number + 1)
        values = same.pivot_table(index="layer", columns="head", values="recovered_kl", aggfunc="mean")
        image = axes.imshow(values.to_numpy(float), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(values.columns)), [str(head) for head in values.columns])
        axes.set_yticks(range(len(values.index)), [str(layer) for layer in values.index])
        axes.set_title(f"{method}, {bits} bits", fontsize="medium")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=figure.axes, label="recovered KL")
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

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = formula_of(rows)
    config = list(dict.fromkeys([*names, *(name for name in rows.columns if name.endswith("_bits"))]))
    seconds = "estimated_seconds_per_token"
    means = rows.groupby(config, dropna=False, sort=True)[[seconds, "recovered_kl"]].mean().reset_index()
    for method, same in means.groupby("attention", sort=True):
        axes.scatter(same[seconds], same["recovered_kl"], s=18, label=str(method))
    costs, values = means[seconds].to_numpy(float), means["recovered_kl"].to_numpy(float)
    front = pareto(costs, values)
    axes.plot(costs[front], values[front], color="black", linewidth=1, label="Pareto front")
    axes.axhline(0.0, color="black", linestyle="--", linewidth=1, label="without the head")
    axes.set_xscale("log")
    axes.set_ylim(max(-1.0, float(values.min()) - 0.05), 1.05)
    axes.set_xlabel(f"estimated seconds of a token, the text's number {rows['seq_len'].iloc[0]}, encrypted")
    axes.set_ylabel("recovered KL")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    heads = rows.drop_duplicates(["layer", "head"])
    figure.suptitle(f"mean over {len(heads)} heads; {'; '.join(rows['machine'].unique())}", fontsize="small")
    return figure

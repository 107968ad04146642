"""The pictures of a report. matplotlib is imported here and nowhere else, and draws without a display."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("reports need matplotlib: pip install 'sparsebilevel[report]'") from error

if TYPE_CHECKING:
    from .report import Group, Run

# Okabe and Ito's colours, which colour-blind readers tell apart; then others. After ten labels they begin again with
# other markers and strokes.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C564B",
    "#17A398",
    "#4D4D4D",
)
_MARKERS = "osD^vP*X<>"
_STROKES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))  # also of the sparsities of one method
_DENSE_COLOUR = "#555555"


class Style(NamedTuple):
    """How the curves of a label look; ``stroke`` is the position in `_STROKES` of the first of its sparsities."""

    colour: str
    marker: str
    stroke: int


def draw(groups: list[Group]) -> Iterator[tuple[str, str, bytes]]:
    """``(name, caption, PNG)`` of every picture that the runs of one subject have data for."""
    styles = _styles(groups)
    pictures: tuple[tuple[str, str, Callable[..., Figure | None]], ...] = (
        ("accuracy", "Test accuracy after the last epoch; bars are standard deviations over seeds.", _accuracy),
        ("course", "The course of training; one line a seed.", _course),
        ("iou", "Overlap (intersection over union) of the masks before and after each topology change.", _mask_iou),
        ("density", "Density of each sparse layer at the end, from input to output (first seed).", _layer_density),
        ("flops", "FLOPs of one forward pass of one sample (convolutions and linear layers, 2 a multiply-add): of the "
         "dense network, times each layer's density, and really executed by today's kernels.", _flops),
        ("terms", "Mean size of the direct and the implicit term of the hypergradient.", _terms),
    )  # fmt: skip
    for name, caption, picture in pictures:
        figure = picture(groups, styles)
        if figure is not None:
            yield name, caption, _png(figure)


def _styles(groups: list[Group]) -> dict[str, Style]:
    """Styles by label: a method looks the same in all pictures, and at all sparsities but for the stroke."""
    labels = list(dict.fromkeys(group.label for group in groups if not group.is_dense))
    out = {}
    for i, label in enumerate(labels):
        lap, place = divmod(i, len(_COLOURS))
        out[label] = Style(_COLOURS[place], _MARKERS[(place + 3 * lap) % len(_MARKERS)], lap)
    return out | {group.label: Style(_DENSE_COLOUR, "", 0) for group in groups if group.is_dense}


def _figure(width: float = 8.0, height: float = 4.2, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, axis: Any) -> None:
    """Under the plot, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        columns = max(1, min(4, 96 // (max(map(len, unique)) + 8)))
        lines = -(-len(unique) // columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, lines - 3))  # not at the cost of the plot
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )


def _with_sparsity(group: Group, groups: list[Group], style: Style) -> tuple[str, Any]:
    """(label, stroke) of a curve; the label names the sparsity where the method occurs at several."""
    rivals = [other for other in groups if other.label == group.label]
    stroke = _STROKES[(style.stroke + rivals.index(group)) % len(_STROKES)]
    several = len({other.config.get("sparsity") for other in rivals}) > 1
    return f"{group.label} @ {100 * group.config.get('sparsity', 0):g} %" if several else group.label, stroke


def _percent(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of one value) in percent."""
    from .report import deviation  # which imports this module when it draws

    return 100 * statistics.fmean(values), 100 * (deviation(values) if len(values) > 1 else 0.0)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def _accuracy(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    shown = [g for g in groups if g.values("test_acc")]
    if not shown:
        return None
    sparse = [g for g in shown if not g.is_dense]
    if len({g.config.get("sparsity") for g in sparse}) > 1:
        return _accuracy_curves(sparse, [g for g in shown if g.is_dense], styles)
    figure, axis = _figure(height=1.3 + 0.42 * len(shown))
    for i, group in enumerate(shown):
        mean, deviation = _percent(group.values("test_acc"))
        colour, marker, _ = styles[group.label]
        axis.errorbar(mean, i, xerr=deviation or None, color=colour, marker=marker or "s", markersize=8, capsize=4)
        axis.annotate(
            f"{mean:.2f}", (mean, i), (0, 9), textcoords="offset points", ha="center", fontsize=9, color=colour
        )
    axis.set_yticks(range(len(shown)), [g.label for g in shown])
    axis.set_ylim(len(shown) - 0.4, -0.7)
    axis.margins(x=0.15)
    sparsity = f" at {100 * sparse[0].config.get('sparsity', 0):g} % sparsity" if sparse else ""
    axis.set_xlabel(f"test accuracy{sparsity} (%)")
    return figure


def _accuracy_curves(sparse: list[Group], dense: list[Group], styles: dict[str, Style]) -> Figure:
    """One curve a method over density on a logarithmic axis, on which 90, 95, 98 and 99 % are apart."""
    figure, axis = _figure(height=4.8)
    for group in dense:
        mean, deviation = _percent(group.values("test_acc"))
        axis.axhline(mean, color=_DENSE_COLOUR, linestyle="--", linewidth=1.3, label=group.label)
        axis.axhspan(mean - deviation, mean + deviation, color=_DENSE_COLOUR, alpha=0.12, linewidth=0)
    for label in dict.fromkeys(group.label for group in sparse):
        members = [g for g in sparse if g.label == label]
        points = [(1 - statistics.fmean(g.values("sparsity") or [g.config["sparsity"]]), g) for g in members]
        points.sort(key=lambda point: -point[0])
        means, deviations = zip(*(_percent(g.values("test_acc")) for _, g in points), strict=True)
        colour, marker, stroke = styles[label]
        axis.errorbar(
            [density for density, _ in points], means, yerr=deviations if any(deviations) else None,
            color=colour, marker=marker, markersize=6, linestyle=_STROKES[stroke % len(_STROKES)], linewidth=1.5,
            capsize=3, label=label,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.invert_xaxis()
    ticks = sorted({round(1 - g.config["sparsity"], 6) for g in sparse}, reverse=True)
    axis.set_xticks(ticks, [f"{100 * (1 - tick):g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sparsity of the sparse layers (%, logarithmic in density)")
    axis.set_ylabel("test accuracy (%)")
    _legend(figure, axis)
    return figure


# -- over time ---------------------------------------------------------------------------------------------------------


def _series(run: Run, name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a field of the epoch rows, where it is logged."""
    rows = [row for row in run.epochs if isinstance(row.get(name), (int, float))]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def _plot_runs(
    axis: Any, groups: list[Group], styles: dict[str, Style], series: Callable[[Run], Any], **style: Any
) -> bool:
    """One line a run, in the colour of its group. False if there is nothing to draw."""
    drawn = False
    for group in groups:
        label, stroke = _with_sparsity(group, groups, styles[group.label])
        options = {"color": styles[group.label].colour, "linestyle": stroke, "linewidth": 1.5} | style
        for x, y in map(series, group.runs):
            if x:
                axis.plot(x, y, label=label, **(options | {"marker": "o"} if len(x) == 1 else options))
                drawn = True
    return drawn


def _course(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    figure, axes = _figure(height=7.2, rows=3)
    fields = (
        ("train_loss", "training loss", 1.0),
        ("test_acc", "test accuracy (%)", 100.0),
        ("sparsity", "sparsity (%)", 100.0),
    )
    drawn = False
    for axis, (name, title, scale) in zip(axes, fields, strict=True):

        def scaled(run: Run, name: str = name, scale: float = scale) -> tuple[list[float], list[float]]:
            x, y = _series(run, name)
            return x, [scale * value for value in y]

        shown = [g for g in groups if not (g.is_dense and name == "sparsity")]
        drawn |= _plot_runs(axis, shown, styles, scaled)
        axis.set_ylabel(title)
    losses = [value for group in groups for run in group.runs for value in _series(run, "train_loss")[1]]
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes[0].set_yscale("log")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[0])
    return figure if drawn else None


def _mask_iou(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    def changes(run: Run) -> tuple[list[float], list[float]]:
        rows = [row for row in run.topology if isinstance(row.get("iou"), (int, float))]
        if rows:
            return [row["step"] for row in rows], [row["iou"] for row in rows]
        rows = [row for row in run.epochs if isinstance(row.get("mask_iou"), (int, float))]
        return [row["step"] for row in rows], [row["mask_iou"] for row in rows]

    figure, axis = _figure()
    if not _plot_runs(axis, groups, styles, changes, marker="o", markersize=3, linewidth=1.0):
        return None
    axis.set_xlabel("step of the method")
    axis.set_ylabel("mask IoU")
    axis.set_ylim(top=1.02)
    _legend(figure, axis)
    return figure


def _terms(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    figure, axes = _figure(height=5.4, rows=2)
    drawn = False
    for axis, name in zip(axes, ("direct", "implicit"), strict=True):
        drawn |= _plot_runs(axis, groups, styles, lambda run, name=name: _series(run, name))  # type: ignore[misc]
        axis.set_ylabel(f"{name} term")
        if any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[0])
    return figure if drawn else None


# -- layers and costs --------------------------------------------------------------------------------------------------


def _layer_density(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    shown = [(group, run) for group in groups for run in group.runs[:1] if run.layers]
    if not shown:
        return None
    names = max(([layer["name"] for layer in run.layers] for _, run in shown), key=len)
    figure, axis = _figure(width=max(8.0, min(14.0, 0.27 * len(names))), height=4.8)
    for group, run in shown:
        colour, marker, _ = styles[group.label]
        label, stroke = _with_sparsity(group, [g for g, _ in shown], styles[group.label])
        axis.plot(
            range(len(run.layers)), [100 * layer["density"] for layer in run.layers],
            color=colour, linestyle=stroke, marker=marker, markersize=4, linewidth=1.2, label=label,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(0.8 * axis.get_ylim()[0], 115)
    axis.set_ylabel("density (% of the weights)")
    step = max(1, -(-len(names) // 48))
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=8)
    axis.set_xlabel("layer")
    _legend(figure, axis)
    return figure


def _flops(groups: list[Group], styles: dict[str, Style]) -> Figure | None:
    kinds = (("flops_dense", "dense", "#B8B8B8"), ("flops_theoretical", "times density", "#0072B2"),
             ("flops_executed", "executed", "#E69F00"))  # fmt: skip
    shown = [g for g in groups if all(g.values("costs", kind) for kind, _, _ in kinds)]
    if not shown:
        return None
    largest = max(value for g in shown for value in g.values("costs", "flops_dense"))
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")) if largest >= s), (1.0, "FLOP")
    )
    figure, axis = _figure(height=1.5 + 0.6 * len(shown))
    for j, (kind, title, colour) in enumerate(kinds):
        values = [statistics.fmean(g.values("costs", kind)) / scale for g in shown]
        bars = axis.barh([i + 0.27 * (j - 1) for i in range(len(shown))], values, 0.25, color=colour, label=title)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(shown)), [_with_sparsity(g, groups, styles[g.label])[0] for g in shown])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.1)
    axis.set_xlabel(f"{unit} of one forward pass of one sample")
    _legend(figure, axis)
    return figure


# -- workers on a graph ------------------------------------------------------------------------------------------------


def decentralized_curves(results: dict[str, list[dict[str, Any]]]) -> bytes:
    """PNG of the figures of `sparsebilevel decentralized` against sample gradients, which cost all algorithms alike."""
    score = "test_auc" if all("test_auc" in rows[-1] for rows in results.values() if rows) else "test_acc"
    fields = (
        ("upper_loss", "upper loss", False),
        (score, "test AUC" if score == "test_auc" else "test accuracy", False),
        ("consensus_error", "consensus error", True),
        ("mask_sparsity", "zeros in the masks", False),
        ("bytes_total", "bytes sent", True),
    )
    figure, axes = _figure(height=11.0, rows=len(fields))
    for axis, (field, title, is_logarithmic) in zip(axes, fields, strict=True):
        for i, (name, rows) in enumerate(results.items()):
            points = [(row["evaluations"], row[field]) for row in rows if row[field] > 0 or not is_logarithmic]
            if points:
                lap, place = divmod(i, len(_COLOURS))
                axis.plot(*zip(*points, strict=True), color=_COLOURS[place], linestyle=_STROKES[lap], label=name)
        axis.set_ylabel(title)
        if is_logarithmic and axis.lines:
            axis.set_yscale("log")
    axes[-1].set_xlabel("gradients of single samples, per worker")
    _legend(figure, axes[0])
    return _png(figure)


def federated_curves(logs: dict[str, list[dict[str, Any]]]) -> bytes:
    """PNG of the course of `sparsebilevel federated`: accuracy and costs, and penalties while gates are learned."""
    titles = {
        "pooled_acc": "accuracy, devices",
        "server_ratio": "T, server",
        "device_ratio": "T, mean device",
        "server_penalty": "penalty, server",
        "device_penalty": "penalty, devices",
        "sparsity": "zeros in the mask",
    }
    seen = {field for rows in logs.values() for row in rows for field in row}
    fields = [field for field in titles if field in seen]
    figure, axes = _figure(height=2.0 * max(len(fields), 1), rows=max(len(fields), 1))
    axes = axes if len(fields) > 1 else [axes]
    for axis, field in zip(axes, fields, strict=False):
        for i, (name, rows) in enumerate(logs.items()):
            found = [(row["round"], row[field]) for row in rows if field in row]
            points = [(x, statistics.fmean(y) if isinstance(y, list) else y) for x, y in found]
            if points:
                axis.plot(*zip(*points, strict=True), color=_COLOURS[i % len(_COLOURS)], label=name)
        axis.set_ylabel(titles[field])
    axes[-1].set_xlabel("round")
    _legend(figure, axes[0])
    return _png(figure)


def federated_channels(results: dict[str, dict[str, Any]]) -> bytes:
    """PNG of the channels kept at every gate point: the server's, those of any device, and the devices' mean."""
    figure, axes = _figure(height=2.6 * len(results), rows=len(results))
    for axis, (name, row) in zip(axes if len(results) > 1 else [axes], results.items(), strict=True):
        for i, (field, label) in enumerate(
            (("server_kept", "server"), ("union_kept", "any device"), ("device_kept", "mean device"))
        ):
            axis.plot(row[field], color=_COLOURS[i], marker=_MARKERS[i], markersize=4, label=label)
        axis.set_ylabel(f"{name}: channels")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("gate point, from input to output")
    _legend(figure, axis)
    return _png(figure)

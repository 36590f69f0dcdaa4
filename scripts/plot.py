"""Draw learning curves: one panel per environment, one line per algorithm, its runs aggregated.

    python scripts/plot.py runs                                all runs in a folder, at any depth
    python scripts/plot.py results/off_policy.jsonl --smooth 5           committed raw curves
    python scripts/plot.py runs --save results/sac.jsonl       save the points as raw curves
    python scripts/plot.py runs/a runs/b --legend "lr 1e-3" "lr 3e-4"    name the folders
    python scripts/plot.py runs --value loss/critic --x wall --select Hopper --exclude td3

A run is a folder with config.json and metrics.jsonl, as the files of algos/ write it. A run under
way is drawn up to its newest point. In a .jsonl file of raw curves, each line is one point of one
run: {"algo": "sac", "env_id": "Hopper-v4", "seed": 1, "commit": "3f2a...", "versions": {"torch":
"2.13.0"}, "step": 5000, "eval/return": 123.4}. The commit and the versions are those of the run's
config.json, or null. For --select and --exclude, the path of such a run is FILE/ENV__ALGO__SEED.

The runs of one line have the same environment, algorithm and --exp-name. With --legend, they have
the same environment and come from the same argument.

Each run is smoothed. The runs of a line are then interpolated at all of their steps within the
range that every run covers, and aggregated there. The band is the 95 % confidence interval of the
mean by Student's t, or with --band std the standard deviation of the runs. Only a mean has a band.

The table shows the mean at the end of each line with its 95 % interval, and the line's maximum.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import Curve, read_curves
from matplotlib.ticker import EngFormatter

matplotlib.use("Agg")  # draw without a screen

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444"]
DASHES = ["-", "--", ":"]  # tell lines apart that share a colour
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#E6E6E6",
}
UNITS = {"steps": 1, "seconds": 1, "minutes": 60, "hours": 3600}  # units of the x-axis
format_step = EngFormatter(sep="")  # 200k, 1M


@dataclass
class Args:
    """Draw learning curves: one panel per environment, one line per algorithm."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, .jsonl files of raw curves
    value: str = "eval/return"  # the metric on the y-axis
    x: Literal["step", "wall"] = "step"  # environment steps, or seconds since the run began
    smooth: int = 1  # points in the centred moving average; 1: none
    est: Literal["mean", "median", "max", "min"] = "mean"  # statistic of the runs of a line
    band: Literal["ci", "std"] = "ci"  # 95 % interval of the mean, or standard deviation of runs
    legend: tuple[str, ...] = ()  # one name per path
    count: bool = False  # show the number of runs in the legend
    select: tuple[str, ...] = ()  # draw only runs whose path contains all of these
    exclude: tuple[str, ...] = ()  # skip runs whose path contains any of these
    output: Path = Path("curves.png")  # the figure: .png, .pdf or .svg
    save: Path | None = None  # write the points, not smoothed, to this .jsonl file


class Points(NamedTuple):
    """The points of one metric of one run."""

    curve: Curve
    x: np.ndarray  # ascending [n]
    y: np.ndarray  # [n]


def plot(args):
    """Draw the figure and print the table. Raises ValueError if the input is bad."""
    if not args.paths:
        raise ValueError("give folders of runs, or .jsonl files of raw curves")
    if args.smooth < 1:
        raise ValueError(f"--smooth is {args.smooth}; it must be 1 or more")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output {args.output} must end in .png, .pdf or .svg")
    lines = align(collect(args), args.x)
    unit = choose_unit(lines, args.x)

    table = tabulate(lines, args, unit)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    with plt.rc_context(STYLE):
        figure = draw(lines, args, unit)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
        plt.close(figure)
    print(args.output)


# Reading


def collect(args):
    """Read, select, save and smooth the runs: {env_id: {label: [(x, y), ...]}}."""
    curves = select_curves(args)
    points = read_points(curves, args)
    check_seeds(points, args)
    if args.save:
        save_points(points, args)
    lines = defaultdict(lambda: defaultdict(list))
    for curve, x, y in points:
        lines[curve.env_id][curve.label].append((x, smooth(y, args.smooth)))
    return lines


def select_curves(args):
    """The curves in the paths that pass --select and --exclude, each once, named by --legend."""
    if args.legend and len(args.legend) != len(args.paths):
        raise ValueError(
            f"--legend has {len(args.legend)} names for {len(args.paths)} paths: "
            "give one name per path"
        )
    curves = {}
    for i, path in enumerate(args.paths):
        for curve in find_curves(path):
            if not all(part in curve.path for part in args.select):
                continue
            if any(part in curve.path for part in args.exclude):
                continue
            if args.legend:
                curve = curve._replace(label=args.legend[i])
            # One path may lie inside another one, so the same run may be found twice.
            curves.setdefault(Path(curve.path).resolve(), curve)
    if not curves:
        raise ValueError(
            "no run found: give folders with config.json and metrics.jsonl "
            "that pass --select and --exclude"
        )
    return list(curves.values())


def find_curves(path):
    """The curves of the runs in a folder, at any depth, or in a .jsonl file of raw curves."""
    if not path.is_dir():
        return read_curves(path)
    curves = []
    for config in sorted(path.rglob("config.json")):
        if config.with_name("metrics.jsonl").exists():
            curves += read_curves(config.parent)
    return curves


def read_points(curves, args):
    """The Points of all curves that have the metric. Warns of the others."""
    points = []
    paths_without = []
    for curve in curves:
        try:
            x, y = metric_points(curve.rows, args.x, args.value)
        except (ValueError, TypeError):
            raise ValueError(
                f"{args.x} or {args.value} is not a number in {curve.path}: choose another --value"
            ) from None
        if len(x):
            points.append(Points(curve, x, y))
        else:
            paths_without.append(curve.path)
    if not points:
        rows = [row for curve in curves for row in curve.rows if args.x in row]
        metrics = sorted({name for row in rows for name in row if "/" in name})
        hint = f"no row has a metric and a {args.x}"
        if metrics:
            hint = f"choose --value from {', '.join(metrics)}"
        raise ValueError(f"no run has {args.value} by {args.x}: {hint}")
    if paths_without:
        print(
            f"warning: left out, without {args.value} by {args.x}: {', '.join(paths_without)}",
            file=sys.stderr,
        )
    return points


def metric_points(rows, x, value):
    """The points of a metric: x ascending [n], y [n]. Values at the same x are averaged."""
    pairs = [(row[x], row[value]) for row in rows if x in row and value in row]
    pairs = np.array(pairs, float).reshape(-1, 2)
    unique_x, index, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return unique_x, np.bincount(index, pairs[:, 1], len(unique_x)) / counts


def check_seeds(points, args):
    """Warn of runs of one line with the same seed. Raises ValueError if they are to be saved."""
    seeds = defaultdict(list)
    for curve, _, _ in points:
        seeds[curve.env_id, curve.label].append(curve.seed)
    for (env_id, label), seeds_of_line in seeds.items():
        if len(seeds_of_line) == len(set(seeds_of_line)):
            continue
        problem = f"{label} on {env_id} has runs with the same seed"
        hint = "if they differ in more, tell them apart by --legend, --select or --exclude"
        if args.save:  # only the seed says which run a saved point belongs to
            raise ValueError(f"--save would merge runs: {problem}; {hint}")
        print(f"warning: {problem}: {hint}", file=sys.stderr)


def save_points(points, args):
    """Write the points to --save, one line of JSON per point."""
    lines = []
    for curve, x, y in points:
        origin = {
            "algo": curve.label,
            "env_id": curve.env_id,
            "seed": curve.seed,
            "commit": curve.commit,
            "versions": curve.versions,
        }
        if args.x == "step":
            x = x.astype(int)
        for x_value, y_value in zip(x.tolist(), y.tolist(), strict=True):
            lines.append(json.dumps(origin | {args.x: x_value, args.value: y_value}) + "\n")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    args.save.write_text("".join(lines))


# Statistics


def smooth(y, n):
    """Moving average of n points centred at each of y. Near the ends it has fewer points."""
    return np.array([y[max(0, i - n // 2) : i + (n + 1) // 2].mean() for i in range(len(y))])


def align(lines, x_name):
    """Interpolate the runs of each line: {env_id: {label: (x [n], values [runs, n])}}."""
    aligned = {}
    for env_id, curves_of_label in lines.items():
        aligned[env_id] = {}
        for label, curves in curves_of_label.items():
            x, values = interpolate(curves)
            if not len(x):
                raise ValueError(
                    f"the runs of {label} on {env_id} share no {x_name}: --exclude the shortest"
                )
            aligned[env_id][label] = x, values
    return aligned


def interpolate(curves):
    """Curves (x, y) -> all their x in the range that each covers [n], their values [runs, n]."""
    start = max(x[0] for x, _ in curves)
    end = min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(start <= grid) & (grid <= end)]
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def student_t(df):
    """The 97.5 % quantile of Student's t: half of a 95 % interval in standard errors."""
    # With t = sqrt(df) tan(angle), the density of t becomes cos(angle)^(df - 1).
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (df - 1)
    mass = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return np.sqrt(df) * np.tan(np.interp(0.95, mass / mass[-1], angle))


def half_band(values, band):
    """Half of the band around the mean of values [runs, n] -> [n]. Zeros for a single run."""
    runs = len(values)
    if runs == 1:
        return np.zeros(values.shape[1])
    std = values.std(0, ddof=1)
    if band == "std":
        return std
    return student_t(runs - 1) * std / np.sqrt(runs)


# Table and figure


def choose_unit(lines, x_name):
    """The unit of the x-axis. For times: the largest of which the longest line has two."""
    if x_name == "step":
        return "steps"
    longest = max(x[-1] for by_label in lines.values() for x, _ in by_label.values())
    chosen = "seconds"
    for unit in ("minutes", "hours"):
        if longest >= 2 * UNITS[unit]:
            chosen = unit
    return chosen


def format_number(number):
    """A number with four significant digits, or without decimals from 1000 on."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def tabulate(lines, args, unit):
    """The table as rows of strings: a head, then one row per line."""
    rows = [("environment", "line", "runs", "until", "final", "highest")]
    for env_id, by_label in lines.items():
        for label, (x, values) in by_label.items():
            mean = values.mean(0)
            until = format_step(x[-1])
            if args.x == "wall":
                until = f"{x[-1] / UNITS[unit]:.1f} {unit}"
            final = format_number(mean[-1])
            if len(values) > 1:
                final += f" +- {format_number(half_band(values, 'ci')[-1])}"
            highest = format_number(mean.max())
            rows.append((env_id, label, str(len(values)), until, final, highest))
    return rows


def draw(lines, args, unit):
    """Draw the figure: a grid with one panel per environment, and one legend below."""
    labels = list(dict.fromkeys(label for by_label in lines.values() for label in by_label))
    columns = 2 if len(lines) == 4 else min(len(lines), 3)
    rows = -(-len(lines) // columns)
    size = (1 + 3.9 * columns, 0.6 + 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    handles = {}
    used_axes = axes.flat[: len(lines)]
    for i, (axis, env_id) in enumerate(zip(used_axes, lines, strict=True)):
        for label, (x, values) in lines[env_id].items():
            x = x / UNITS[unit]
            handles[label] = draw_line(axis, x, values, labels.index(label), args)
        format_axis(axis, args)
        axis.set_title(env_id)
        is_lowest_in_column = i + columns >= len(lines)
        if is_lowest_in_column:
            axis.set_xlabel("environment steps" if args.x == "step" else unit)
        if i % columns == 0:
            axis.set_ylabel(args.value)
    for axis in axes.flat[len(lines) :]:
        axis.remove()
    figure.align_ylabels()
    figure.legend(
        [handles[label] for label in labels],
        [legend_text(label, lines, args) for label in labels],
        loc="outside lower center",
        ncols=min(len(labels), 2 * columns),
        frameon=False,
    )
    return figure


def draw_line(axis, x, values, index, args):
    """Draw one line and its band in the look that belongs to its index; returns its handle."""
    color = COLORS[index % len(COLORS)]
    dashes = DASHES[index // len(COLORS) % len(DASHES)]
    marker = "o" if len(x) == 1 else None  # a line of one point is invisible
    statistic = getattr(np, args.est)
    y = statistic(values, 0)
    (handle,) = axis.plot(x, y, dashes, color=color, lw=1.8, marker=marker, ms=4)
    if args.est == "mean" and len(values) > 1:
        half = half_band(values, args.band)
        axis.fill_between(x, y - half, y + half, color=color, alpha=0.18, lw=0)
    return handle


def format_axis(axis, args):
    """Set the grid and the ticks of a panel."""
    axis.grid(True)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.margins(x=0.02)
    if args.x == "step":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M


def legend_text(label, lines, args):
    """The label of a line; with --count, also its number of runs."""
    if not args.count:
        return label
    counts = {len(by_label[label][1]) for by_label in lines.values() if label in by_label}
    return f"{label} ({' or '.join(map(str, sorted(counts)))})"


def main():
    """Draw with the flags of the command line. Exit status 2 is bad input."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        plot(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Draw learning curves: a panel for each environment, a line for each algorithm, the runs of a line aggregated.

    python scripts/plot.py runs                                         all runs in a folder, at any depth
    python scripts/plot.py results/off_policy.jsonl --smooth 5          committed raw curves
    python scripts/plot.py runs --save results/sac.jsonl                all runs, and their points into such a file
    python scripts/plot.py runs/a runs/b --legend "lr 1e-3" "lr 3e-4"   a name for each folder
    python scripts/plot.py runs --value loss/critic --x wall --select Hopper --exclude td3 --output critic.png

A run is a folder with config.json and metrics.jsonl, as algos/ leaves it; one under way is drawn as far as it is. In a
.jsonl file each line is one point of one run: {"algo": "sac", "env_id": "Hopper-v4", "seed": 1, "code": "2db56e58",
"step": 5000, "eval/return": 123.4}, where code says what the algorithm was at the commit that the run was made at (see
blocks.py). To --select and --exclude its path is FILE/ENV__ALGO__SEED. Runs of one line have the same environment,
algorithm and --exp-name; --legend puts the argument they came from in place of the last two.

Each run is smoothed, then the runs of a line are interpolated at all of their steps that lie in the range which every
one of them covers, and aggregated there. The band is what is known of the mean: its 95 % interval by Student's t, or
with --band std the standard deviation of the runs. --est median, max and min are drawn without.

The table gives the mean where the line ends, with its 95 % interval, and the highest mean on the way there.
"""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import tyro
from blocks import fingerprint
from matplotlib.ticker import EngFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444"]  # Okabe and Ito's, for any eye
DASHES = ["-", "--", ":"]  # for more lines than there are colours
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.edgecolor": "#666666", "xtick.color": "#444444", "ytick.color": "#444444", "grid.color": "#E6E6E6"}
UNITS = {"steps": 1, "seconds": 1, "minutes": 60, "hours": 3600}  # of the x-axis, in what metrics.jsonl has


@dataclass
class Args:
    """Draw learning curves: a panel for each environment, a line for each algorithm, the runs of a line aggregated."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders that are or contain runs, and .jsonl files of raw curves
    value: str = "eval/return"  # the metric
    x: Literal["step", "wall"] = "step"  # environment steps, or time since the run began
    smooth: int = 1  # points in a moving average, centred; 1 is none
    est: Literal["mean", "median", "max", "min"] = "mean"  # what a line shows of its runs
    band: Literal["ci", "std"] = "ci"  # around a mean: its 95 % interval, or the standard deviation of the runs
    legend: tuple[str, ...] = ()  # a name for each of the paths
    count: bool = False  # say in the legend how many runs a line has
    select: tuple[str, ...] = ()  # draw only runs whose path contains all of these
    exclude: tuple[str, ...] = ()  # draw no run whose path contains any of these
    output: Path = Path("curves.png")  # the figure
    save: Path | None = None  # write the points, unsmoothed, into a .jsonl file of raw curves


class Run(NamedTuple):
    """One run, as it was found."""

    path: str
    env_id: str
    label: str
    seed: int
    rows: list  # dicts with "step" and metrics
    config: dict  # what config.json holds; nothing for raw curves


def read_rows(path):
    """The rows of a JSONL file. Its last line may be torn, as a run under way or killed leaves it."""
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not JSON: mend or remove it") from None
    return rows


def name(algo, exp_name):
    """What a line is called: the algorithm, and the experiment where it has a name of its own."""
    return algo if exp_name == algo else f"{algo} {exp_name}"


def read_runs(path):
    """The run in a run folder, or those in a .jsonl file of raw curves; ValueError says what is wrong with them."""
    if path.is_dir():
        config = path / "config.json"
        try:
            saved = json.loads(config.read_bytes())
            args = saved["args"]
            of = str(path), args["env_id"], name(saved["algo"], args["exp_name"]), args["seed"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{config} is not the config of a run: mend it or move it away") from None
        return [Run(*of, read_rows(path / "metrics.jsonl"), saved)]
    if path.suffix != ".jsonl" or not path.exists():
        raise ValueError(f"{path} is neither a folder nor a .jsonl file")
    rows_of = defaultdict(list)
    for number, row in enumerate(read_rows(path), 1):
        try:
            rows_of[row["env_id"], name(row["algo"], row.get("exp_name", row["algo"])), row["seed"]].append(row)
        except (KeyError, TypeError, AttributeError):
            lacks = f"line {number} of {path} lacks env_id, algo or seed: for metrics.jsonl, give its folder"
            raise ValueError(lacks) from None
    return [Run(f"{path}/{'__'.join(map(str, key))}", *key, rows, {}) for key, rows in rows_of.items()]


def find_runs(path):
    """The runs in a folder, at any depth, or in a .jsonl file of raw curves."""
    folders = [path]
    if path.is_dir():
        configs = sorted(path.rglob("config.json"))
        folders = [config.parent for config in configs if config.with_name("metrics.jsonl").exists()]
    try:
        return [run for folder in folders for run in read_runs(folder)]
    except ValueError as error:
        sys.exit(f"error: {error}")


def curve(rows, x, value):
    """The points of one metric: x ascending [n], y [n]. Those at the same x are averaged."""
    points = np.array([(row[x], row[value]) for row in rows if x in row and value in row], float).reshape(-1, 2)
    xs, place, times = np.unique(points[:, 0], return_inverse=True, return_counts=True)
    return xs, np.bincount(place, points[:, 1], len(xs)) / times


def smooth(y, n):
    """Moving average of n points around each of y; towards the ends, of those that there are."""
    return np.array([y[max(0, i - n // 2) : i + (n + 1) // 2].mean() for i in range(len(y))])


def interpolate(curves):
    """Curves (x, y) -> all their x in the range which each of them covers [n], and their values there [runs, n]."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(start <= grid) & (grid <= end)]
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def student(df):
    """How many standard errors a 95 % interval reaches to each side, by Student's t with df degrees of freedom."""
    # With t = sqrt(df) tan(angle), the density of t becomes cos(angle)^(df - 1).
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (df - 1)
    mass = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return np.sqrt(df) * np.tan(np.interp(0.95, mass / mass[-1], angle))


def half_width(values, band):
    """Half of the band around the mean of values [runs, n] -> [n]. One run says nothing of it: zeros."""
    if len(values) == 1:
        return np.zeros(values.shape[1])
    std = values.std(0, ddof=1)
    return std if band == "std" else student(len(values) - 1) * std / np.sqrt(len(values))


def brief(number):
    """A number as the table shows it."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def code(run):
    """The fingerprint of the algorithm that made a run, None where its commit is not to be found here."""
    if not run.config:
        return run.rows[0].get("code")
    file = f"{run.config.get('commit')}:algos/{run.config['algo']}.py"
    try:
        shown = subprocess.run(["git", "show", file], cwd=Path(__file__).parent, capture_output=True)
    except FileNotFoundError:  # no git
        return None
    try:
        return None if shown.returncode else fingerprint(shown.stdout)
    except (ValueError, StopIteration, SyntaxError):  # a file of another make
        return None


def collect(args):
    """Find, select, read and smooth the runs: {env id: {label: [(x, y), ...]}}, both in the order of their finding."""
    if args.legend and len(args.legend) != len(args.paths):
        sys.exit(f"error: --legend has {len(args.legend)} names for {len(args.paths)} paths: give one for each")
    runs = {}
    for i, path in enumerate(args.paths):
        for run in find_runs(path):
            wanted = all(part in run.path for part in args.select) and not any(p in run.path for p in args.exclude)
            if wanted:  # and once, although a folder may have been given with one inside of it
                key = Path(run.path).resolve()
                runs.setdefault(key, run._replace(label=args.legend[i]) if args.legend else run)
    if not runs:
        sys.exit("error: no run there: a run has config.json and metrics.jsonl, and passes --select and --exclude")

    lines, seeds, without, raw = defaultdict(lambda: defaultdict(list)), defaultdict(list), [], []
    for run in runs.values():
        try:
            x, y = curve(run.rows, args.x, args.value)
        except (ValueError, TypeError):
            sys.exit(f"error: {args.x} or {args.value} is not a number in {run.path}: take another --value")
        if len(x):
            lines[run.env_id][run.label].append((x, smooth(y, args.smooth)))
            seeds[run.env_id, run.label].append(run.seed)
            of = {"algo": run.label, "env_id": run.env_id, "seed": run.seed, "code": args.save and code(run)}
            at = x.astype(int) if args.x == "step" else x
            raw += [json.dumps(of | {args.x: a, args.value: b}) + "\n" for a, b in zip(at.tolist(), y.tolist())]
        else:
            without.append(run.path)
    if not lines:
        metrics = {key for run in runs.values() for row in run.rows if args.x in row for key in row if "/" in key}
        have = f"take --value from {', '.join(sorted(metrics))}" if metrics else f"no row has a metric and a {args.x}"
        sys.exit(f"error: no run has {args.value} by {args.x}: {have}")
    if without:
        print(f"warning: left out, without {args.value} by {args.x}: {', '.join(without)}", file=sys.stderr)
    for (env_id, label), found in seeds.items():
        if len(found) > len(set(found)):
            same = f"{label} on {env_id} has runs with the same seed"
            hint = "--legend, --select or --exclude tell them apart, if they differ in more"
            if args.save:  # where the seed alone says which run a point is of
                sys.exit(f"error: --save would make one run of several: {same}; {hint}")
            print(f"warning: {same}: {hint}", file=sys.stderr)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text("".join(raw))
    return lines


def align(lines, x):
    """The curves of each line on one grid: {env id: {label: (x [n], values [runs, n])}}."""
    aligned = {env_id: {label: interpolate(found) for label, found in by.items()} for env_id, by in lines.items()}
    for env_id, by_label in aligned.items():
        if apart := [label for label, (grid, _) in by_label.items() if not len(grid)]:
            sys.exit(f"error: the runs of {apart[0]} on {env_id} share no {x}: --exclude the shortest")
    return aligned


def tabulate(lines, args, unit):
    """A row of texts for each line."""
    rows = [("environment", "line", "runs", "until", "final", "highest")]
    for env_id, by_label in lines.items():
        for label, (x, values) in by_label.items():
            mean, interval = values.mean(0), half_width(values, "ci")
            until = EngFormatter(sep="")(x[-1]) if args.x == "step" else f"{x[-1] / UNITS[unit]:.1f} {unit}"
            final = brief(mean[-1]) + (f" +- {brief(interval[-1])}" if len(values) > 1 else "")
            rows.append((env_id, label, str(len(values)), until, final, brief(mean.max())))
    return rows


def draw(lines, args, unit):
    """The figure: a panel for each environment, on a grid, and one legend below."""
    labels = list(dict.fromkeys(label for by_label in lines.values() for label in by_label))
    columns = 2 if len(lines) == 4 else min(len(lines), 3)
    rows = -(-len(lines) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1 + 3.9 * columns, 0.6 + 3 * rows), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    handles = {}
    for place, (axis, (env_id, by_label)) in enumerate(zip(axes.flat, lines.items())):
        for label, (x, values) in by_label.items():
            look, x = labels.index(label), x / UNITS[unit]
            color, dash = COLORS[look % len(COLORS)], DASHES[look // len(COLORS) % len(DASHES)]
            line = getattr(np, args.est)(values, 0)
            marker = "o" if len(x) == 1 else None  # a line of one point would not be seen
            handles[label] = axis.plot(x, line, dash, color=color, lw=1.8, marker=marker, ms=4)[0]
            if args.est == "mean" and len(values) > 1:
                half = half_width(values, args.band)
                axis.fill_between(x, line - half, line + half, color=color, alpha=0.18, lw=0)
        axis.set_title(env_id)
        axis.grid(True)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.margins(x=0.02)
        if args.x == "step":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
        if place + columns >= len(lines):  # the lowest of its column
            axis.set_xlabel("environment steps" if args.x == "step" else unit)
        if place % columns == 0:
            axis.set_ylabel(args.value)
    for axis in axes.flat[len(lines) :]:
        axis.remove()
    figure.align_ylabels()
    counts = {label: sorted({len(by[label][1]) for by in lines.values() if label in by}) for label in labels}
    texts = [label + f" ({' or '.join(map(str, counts[label]))})" * args.count for label in labels]
    shown, across = [handles[label] for label in labels], min(len(labels), 2 * columns)
    figure.legend(shown, texts, loc="outside lower center", ncols=across, frameon=False)
    return figure


def main(args):
    """Draw, and print the table. Bad input raises SystemExit, which says what to do."""
    if not args.paths:
        sys.exit("error: give folders of runs, or .jsonl files of raw curves")
    if args.smooth < 1:
        sys.exit(f"error: --smooth is {args.smooth}, and must be 1 or more")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"error: --output {args.output} must end in .png, .pdf or .svg")
    lines, unit = align(collect(args), args.x), "steps"
    if args.x == "wall":  # the largest unit of which the longest line has two
        longest = max(x[-1] for by_label in lines.values() for x, _ in by_label.values())
        unit = [unit for unit, size in UNITS.items() if size == 1 or longest >= 2 * size][-1]

    table = tabulate(lines, args, unit)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    with plt.rc_context(STYLE):
        figure = draw(lines, args, unit)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
        plt.close(figure)
    print(args.output)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except OSError as error:
        sys.exit(f"error: {error}")

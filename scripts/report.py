"""Make a report of runs: one HTML page with curves, tables, commands and raw data.

    python scripts/report.py runs -o report.html             all runs in a folder, at any depth
    python scripts/report.py results/mujoco.jsonl runs --est iqm    raw curves and runs

Runs, lines and their interpolation are those of plot.py. A damaged or incomplete folder is left
out, and the page and the terminal say why. A run under way is shown up to its newest point. The
page needs nothing but a browser. The same files make the same page, byte for byte.

A line is the mean of its runs, or their interquartile mean (IQM), which drops the lowest and the
highest quarter. Intervals are 95 % percentile intervals of a stratified bootstrap, which resamples
the runs of each environment and line with replacement. The IQM and the probability of improvement
over environments follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", https://arxiv.org/abs/2108.13264. results/published.json holds the figures
that others published.
"""

import base64
import gzip
import json
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro
from common import Curve, read_curves
from matplotlib.ticker import MaxNLocator
from plot import COLORS, format_number, format_step, interpolate, metric_points

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.json"
VALUE = "eval/return"  # the metric that is shown
RESAMPLES = 2000  # draws of a bootstrap
MAX_STEPS_SHOWN = 200  # steps at which a curve is drawn; a screen shows no more
DASHES = ("", "7 4", "2 4")  # tell lines apart that share a colour
MAY_DIFFER = ("seed", "run_dir", "resume")  # flags in which repetitions of a run differ


@dataclass
class Args:
    """Make a report of runs: one HTML page with curves, tables, commands and raw data."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, .jsonl files of raw curves
    est: Literal["mean", "iqm"] = "mean"  # statistic of the runs of a line
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("report.html")  # the page


class Line(NamedTuple):
    """The runs of one algorithm and experiment in one environment."""

    env_id: str
    label: str
    curves: list
    x: np.ndarray  # the steps that all runs cover [n]
    values: np.ndarray  # the returns at these steps [runs, n]


def report(args):
    """Write the page. Raises ValueError if there is no run."""
    lines, left_out = read_lines(args.paths)
    for path, reason in left_out:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if not lines:
        raise ValueError(
            "no run found: give folders of runs with evaluations, or .jsonl files of raw curves"
        )
    page = make_page(lines, left_out, args.est)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # The names of folders can hold bytes that are not text, so replace what cannot be encoded.
    args.output.write_text(page, encoding="utf-8", errors="replace")
    print(args.output)


# Statistics


def mean(values):
    """[..., n] -> [...]"""
    return values.mean(-1)


def iqm(values):
    """Interquartile mean: [..., n] -> [...]. Drops floor(n / 4) values at each end."""
    n = values.shape[-1]
    dropped = n // 4
    return np.sort(values, -1)[..., dropped : n - dropped].mean(-1)


def pooled_iqm(*strata):
    """Interquartile mean of all strata together: arrays [..., n] -> [...]."""
    return iqm(np.concatenate(strata, -1))


def improvement(*strata):
    """P(X > Y) averaged over environments; ties count half. X of each, then Y of each, [..., n]."""
    half = len(strata) // 2
    probabilities = []
    for x, y in zip(strata[:half], strata[half:], strict=True):
        x = x[..., :, None]
        y = y[..., None, :]
        wins = (x > y) + 0.5 * (x == y)
        probabilities.append(wins.mean((-2, -1)))
    return np.mean(probabilities, 0)


def bootstrap(strata, statistic):
    """The 95 % percentile interval of statistic(*strata); resamples the runs [n] of each."""
    rng = np.random.default_rng(0)
    resampled = []
    for values in strata:
        n = len(values)
        resampled.append(values[rng.integers(n, size=(RESAMPLES, n))])
    return np.quantile(statistic(*resampled), (0.025, 0.975))


def with_interval(strata, statistic):
    """A statistic and its interval as a string. Single runs have no interval."""
    text = format_number(statistic(*strata))
    if max(map(len, strata)) == 1:
        return text
    low, high = bootstrap(strata, statistic)
    return f"{text} [{format_number(low)}, {format_number(high)}]"


# Reading


class Evaluations(NamedTuple):
    """The evaluations of one run."""

    curve: Curve
    x: np.ndarray  # steps, ascending [n]
    y: np.ndarray  # returns [n]


def read_lines(paths):
    """Read the lines and what is left out: [Line, ...], [(path, reason), ...]."""
    curves, left_out = read_all(paths)
    lines = []
    for (env_id, label), runs in group(curves, left_out).items():
        x, values = interpolate([(x, y) for _, x, y in runs])
        curves = [run.curve for run in runs]
        if len(x):
            lines.append(Line(env_id, label, curves, x, values))
        else:
            reason = f"the runs of {label} on {env_id} share no step"
            left_out += [(curve.path, reason) for curve in curves]
    return lines, left_out


def read_all(paths):
    """Read the runs in all paths: the curves and [(path, reason), ...] of what cannot be read."""
    curves = []
    left_out = []
    for path in paths:
        # A folder with one of the two files is an incomplete run, and is named as one.
        folders = {file.parent for file in path.rglob("config.json")}
        folders |= {file.parent for file in path.rglob("metrics.jsonl")}
        for folder in sorted(folders) or [path]:
            try:
                curves += read_curves(folder)
            except FileNotFoundError as error:
                left_out.append((folder, f"it has no {Path(error.filename).name}"))
            except (OSError, ValueError) as error:
                left_out.append((folder, str(error)))
    return curves, left_out


def group(curves, left_out):
    """The Evaluations of each environment and label. Appends damaged runs to `left_out`."""
    groups = defaultdict(dict)
    for curve in curves:
        try:
            run = read_evaluations(curve)
        except ValueError as error:
            left_out.append((curve.path, str(error)))
            continue
        # A copy of a run is not a second run, and neither is a path that is given twice.
        content = (str(curve.seed), run.x.tobytes(), run.y.tobytes())
        first = groups[curve.env_id, curve.label].setdefault(content, run).curve
        if Path(first.path).resolve() != Path(curve.path).resolve():
            left_out.append((curve.path, f"its seed and evaluations are those of {first.path}"))
    return {key: list(runs.values()) for key, runs in groups.items()}


def read_evaluations(curve):
    """The Evaluations of a run. Raises ValueError if they or its config are damaged."""
    try:
        x, y = metric_points(curve.rows, "step", VALUE)
    except (ValueError, TypeError):
        raise ValueError(f"a step or {VALUE} in it is not a number") from None
    if not len(x):
        raise ValueError(f"it has no {VALUE} yet")
    if not (np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError(f"a step or {VALUE} in it is not finite")
    try:
        describe_progress(curve)
        describe_origin(curve)
    except (ValueError, TypeError, AttributeError):
        raise ValueError("its config.json or its rows are not what algos/ writes") from None
    return Evaluations(curve, x, y)


def values_at(line, steps):
    """The returns of the runs of a line at steps [...] that it covers: [runs, ...]."""
    return np.array([np.interp(steps, line.x, values) for values in line.values])


def last_common_step(lines):
    """The last step that all lines cover, or None."""
    step = min(line.x[-1] for line in lines)
    return step if step >= max(line.x[0] for line in lines) else None


def is_under_way(curve):
    """Whether a run has not finished. Raw curves do not say, so they count as finished."""
    return curve.config is not None and not (Path(curve.path) / "result.json").exists()


def count_noun(count, noun):
    """A count and its noun, such as "2 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def describe_size(line):
    """The number of seeds of a line, of runs if there are more, and of runs under way."""
    runs = len(line.curves)
    seeds = len({str(curve.seed) for curve in line.curves})
    under_way = sum(map(is_under_way, line.curves))
    text = count_noun(seeds, "seed")
    if runs != seeds:
        text = f"{runs} runs of {text}"
    if under_way:
        text += f", {under_way} under way"
    return text


def describe_differences(line):
    """A sentence for each flag in which the runs of a line differ, so they are no repetitions."""
    args_of_runs = [curve.config["args"] for curve in line.curves if curve.config]
    flags = dict.fromkeys(flag for args in args_of_runs for flag in args)
    sentences = []
    for flag in flags:
        if flag in MAY_DIFFER:
            continue
        values = dict.fromkeys(json.dumps(args.get(flag)) for args in args_of_runs)
        if len(values) > 1:
            alternatives = " or ".join(values)
            sentences.append(
                f"{line.label} on {line.env_id}: its runs differ in {flag}: {alternatives}."
            )
    return sentences


def last_value(curve, metric):
    """The newest value of a metric in a run, or None."""
    for row in reversed(curve.rows):
        if metric in row:
            return row[metric]
    return None


def describe_progress(curve):
    """What a run is, how far and how fast it got, as cells of HTML."""
    steps = f"{last_value(curve, 'step'):,.0f}"
    if is_under_way(curve):
        steps += f" of {curve.config['args'].get('total_timesteps', 0):,}, under way"
    speed = last_value(curve, "speed/sps")
    speed = "–" if speed is None else f"{speed:,.0f}"
    return [escape(curve.env_id), escape(curve.label), escape(str(curve.seed)), steps, speed]


def describe_origin(curve):
    """The versions, commit, path and command of a run, as cells of HTML."""
    versions = (curve.versions or {}).items()
    versions = ", ".join(f"{package} {version}" for package, version in versions if version)
    commit = escape((curve.commit or "–")[:10])
    command = "–"
    if curve.config and "command" in curve.config:
        command = escape(shlex.join(["python", *curve.config["command"]]))
    return [
        escape(versions),
        f"<code>{commit}</code>",
        escape(curve.path),
        f"<code>{command}</code>",
    ]


def raw_data(curve):
    """The text of a run's metrics.jsonl, or its lines of a file of raw curves."""
    if curve.config:
        return (Path(curve.path) / "metrics.jsonl").read_bytes().decode(errors="replace")
    return "".join(json.dumps(row) + "\n" for row in curve.rows)


# Packing raw data


def pack(text):
    """Compress the text of a JSONL file to base64 of gzip, which unpack() on the page reverses.

    Lines are split at their numbers. Lines with the same text between the numbers share a table,
    which is stored column by column. With pack_column(), that takes 60 % of the compressed lines.
    """
    tables = defaultdict(list)  # the texts between the numbers of a line -> rows of numbers
    keys = []  # the table of each line
    for line in text.split("\n"):
        pieces = re.split(r"(-?\d+(?:\.\d+)?)", line)
        key = tuple(pieces[::2])
        tables[key].append(pieces[1::2])
        keys.append(key)
    columns = []
    with np.errstate(over="ignore"):
        for rows in tables.values():
            columns.append([pack_column(list(column)) for column in zip(*rows, strict=True)])
    indices = {key: i for i, key in enumerate(tables)}
    content = [list(tables), columns, [indices[key] for key in keys]]
    packed = json.dumps(content, separators=(",", ":"))
    return base64.b64encode(gzip.compress(packed.encode(), mtime=0)).decode()


def pack_column(numbers):
    """Join a column of numbers, given as strings. "f" marks float32 numbers in float32's digits."""
    wide = np.array(numbers, float)
    narrow = wide.astype(np.float32)
    # JavaScript writes -0.0 as 0, so a column with it stays as it is.
    if (narrow == wide).all() and "-0.0" not in numbers:
        texts = narrow.astype(str)
        restored = [repr(number) for number in texts.astype(float).astype(np.float32).tolist()]
        if restored == numbers:
            return "f" + ",".join(texts)
    return ",".join(numbers)


# Parts of the page


def html_table(head, rows, numeric_columns=()):
    """A table that scrolls inside its box. Cells are HTML; numeric columns align to the right."""
    classes = ["n" if i in numeric_columns else "" for i in range(len(head))]

    def html_row(cells, tag):
        parts = []
        for name, cell in zip(classes, cells, strict=True):
            parts.append(f'<{tag} class="{name}">{cell}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(html_row(row, "td") + "\n" for row in rows)
    return (
        f'<div class="scroll"><table><thead>{html_row(head, "th")}</thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def join_names(names):
    """Names, separated by commas and escaped."""
    return escape(", ".join(names))


def stroke(index):
    """The attributes of a path in the colour and the dashes of a line."""
    dashes = DASHES[index // len(COLORS) % len(DASHES)]
    return f'class="c{index % len(COLORS)}" stroke-dasharray="{dashes}"'


def round_ticks(start, end):
    """Round numbers from start to end."""
    ticks = MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)).tick_values(start, end)
    return [tick for tick in ticks if start <= tick <= end]


class Band(NamedTuple):
    """The estimate of a line and its interval at the steps that it covers."""

    covered: np.ndarray  # whether the line covers each of the panel's steps [steps]
    middle: np.ndarray  # [covered steps]
    low: np.ndarray  # [covered steps]
    high: np.ndarray  # [covered steps]


def choose_steps(lines):
    """The steps at which a panel is drawn: evenly spread ones, and the ends of all lines."""
    steps = np.unique(np.concatenate([line.x for line in lines]))
    count = min(len(steps), MAX_STEPS_SHOWN)
    shown = np.linspace(0, len(steps) - 1, count).round().astype(int)
    starts = [line.x[0] for line in lines]
    ends = [line.x[-1] for line in lines]
    return np.unique(np.concatenate([steps[shown], starts, ends]))


def estimate_band(line, steps, estimate):
    """The Band of a line. A single run has no width."""
    covered = (line.x[0] <= steps) & (steps <= line.x[-1])
    values = values_at(line, steps[covered]).T  # [steps, runs]
    middle = estimate(values)
    if len(line.curves) == 1:
        return Band(covered, middle, middle, middle)
    intervals = np.array([bootstrap([returns], estimate) for returns in values])
    return Band(covered, middle, intervals[:, 0], intervals[:, 1])


class Panel(NamedTuple):
    """The panel of one environment."""

    html: str
    data: dict  # what reading the curves needs; positions in percent from the top left


def draw_panel(number, lines, labels, estimate):
    """Draw the Panel of the lines of one environment."""
    steps = choose_steps(lines)
    bands = [estimate_band(line, steps, estimate) for line in lines]
    right = steps[-1] or 1
    lowest = min(band.low.min() for band in bands)
    highest = max(band.high.max() for band in bands)
    padding = 0.04 * (highest - lowest) or 1
    bottom = lowest - padding
    top = highest + padding
    across = np.round(100 * steps / right, 2)

    def down(y):
        return np.round(100 * (top - y) / (top - bottom), 2)

    areas = ""
    paths = ""
    legend = []
    data_of_lines = []
    for line, band in zip(lines, bands, strict=True):
        index = labels.index(line.label)
        x = across[band.covered]
        texts = band_texts(line, band)
        if len(line.curves) > 1:
            outline_x = np.concatenate([x, x[::-1]])
            outline_y = down(np.concatenate([band.low, band.high[::-1]]))
            areas += f'<path {stroke(index)} d="{svg_path(outline_x, outline_y)}Z"/>'
        dot = " data-dot" if len(x) == 1 else ""
        paths += f'<path {stroke(index)}{dot} d="{svg_path(x, down(band.middle))}h0"/>'
        key = f"{legend_key(index)} {escape(line.label)}"
        legend.append((key, describe_size(line), texts[-1]))
        data_of_lines.append(
            {
                "label": line.label,
                "color": index % len(COLORS),
                "y": spread(down(band.middle), band.covered),
                "text": spread(texts, band.covered),
            }
        )
    html = Template(PANEL).substitute(
        number=number,
        env_id=escape(lines[0].env_id),
        labels=join_names(line.label for line in lines),
        grid=draw_grid(bottom, top, right, down),
        areas=areas,
        paths=paths,
        legend=html_table(("line", "", '<span class="at">at its end</span>'), legend, (2,)),
    )
    steps_as_text = [f"{step:,.0f}" for step in steps]
    return Panel(html, {"x": across.tolist(), "steps": steps_as_text, "lines": data_of_lines})


def band_texts(line, band):
    """The estimate and the interval of a line at each step that it covers, as strings."""
    texts = [format_number(y) for y in band.middle]
    if len(line.curves) > 1:
        for i, (low, high) in enumerate(zip(band.low, band.high, strict=True)):
            texts[i] += f" [{format_number(low)}, {format_number(high)}]"
    return texts


def spread(values, covered):
    """A list with one value for each covered step of a panel and None for the others."""
    values_of_all = np.full(len(covered), None)
    values_of_all[covered] = values
    return values_of_all.tolist()


def legend_key(index):
    """A short stroke in the look of a line."""
    return (
        '<svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path {stroke(index)} d="M1 4h22"/></svg>'
    )


def svg_path(x, y):
    """The commands of an SVG path through points."""
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x, y, strict=True))


def draw_grid(bottom, top, right, down):
    """The grid and the tick labels of a panel."""
    grid = ""
    for tick in round_ticks(bottom, top):
        text = format_step(tick) if abs(tick) >= 1e5 else f"{tick:g}"
        grid += f'<i style="top:{down(tick):g}%"><b>{text}</b></i>'
    for tick in round_ticks(0, right):
        grid += f'<u style="left:{100 * tick / right:g}%">{format_step(tick)}</u>'
    return grid


def table_of_ends(lines, estimate):
    """The table of where the lines end."""
    rows = []
    for line in lines:
        speeds = [last_value(curve, "speed/sps") for curve in line.curves]
        speeds = [speed for speed in speeds if speed is not None]
        rows.append(
            (
                escape(line.env_id),
                escape(line.label),
                describe_size(line),
                f"{line.x[-1]:,.0f}",
                with_interval([line.values[:, -1]], estimate),
                format_number(estimate(line.values.T).max()),
                f"{np.median(speeds):,.0f}" if speeds else "–",
            )
        )
    head = ("environment", "line", "runs", "until step", "final", "highest", "steps/s")
    return html_table(head, rows, range(3, 7))


def environment_name(env_id):
    """The id of an environment without its version."""
    return env_id.rpartition("-v")[0]


def table_of_published(lines, estimate):
    """The table of our lines beside published figures at the same step."""
    published = json.loads(PUBLISHED.read_bytes())
    rows = []
    for line in lines:
        algo = line.label.partition(" ")[0]
        figures = []
        for figure in published:
            same_env = environment_name(figure["env_id"]) == environment_name(line.env_id)
            if figure["algo"] == algo and same_env:
                figures.append(figure)
        covered = [figure for figure in figures if line.x[0] <= figure["step"] <= line.x[-1]]
        if covered:
            for figure in covered:
                ours = with_interval([values_at(line, figure["step"])], estimate)
                rows.append(published_row(line, figure, ours))
        elif figures:
            nearest = min(figures, key=lambda figure: abs(figure["step"] - line.x[-1]))
            ours = f'<span class="soft">ends at {line.x[-1]:,.0f}</span>'
            rows.append(published_row(line, nearest, ours))
    if not rows:
        return "<p>No published figures of these environments and algorithms are known.</p>"
    head = ("environment", "line", "step", "ours", "published", "seeds", "statistic", "source")
    return html_table(head, rows, (2, 3, 4, 5))


def published_row(line, figure, ours):
    """A row of the table of published figures. A tag names another version of the environment."""
    theirs = format_number(figure["value"])
    if "spread" in figure:
        theirs += f" ± {format_number(figure['spread'])}"
    if figure["env_id"] != line.env_id:
        theirs += f' <span class="tag">{figure["env_id"]}</span>'
    return (
        escape(line.env_id),
        escape(line.label),
        f"{figure['step']:,}",
        ours,
        theirs,
        str(figure["seeds"]),
        escape(figure["statistic"]),
        escape(figure["source"]),
    )


def compare(lines, labels):
    """The section that compares lines over environments; "" if no two lines share one."""
    pairs = []
    for x_label, y_label in combinations(labels, 2):
        row = compare_pair(lines, x_label, y_label)
        if row:
            pairs.append(row)
    if not pairs:
        return ""
    scores, scales = normalised_scores(lines)
    ranks = []
    for label, scores_of_env in scores.items():
        strata = list(scores_of_env.values())
        runs = sum(map(len, strata))
        iqm_text = with_interval(strata, pooled_iqm)
        ranks.append((escape(label), iqm_text, str(runs), join_names(scores_of_env)))
    return Template(COMPARISON).substitute(
        scales="; ".join(scales),
        ranks=html_table(("line", "IQM", "runs", "environments"), ranks, (1, 2)),
        pairs=html_table(("X", "Y", "P(X &gt; Y)", "environments"), pairs, (2,)),
    )


def normalised_scores(lines):
    """Scores at the last step that all lines of an environment cover, and the scales as text.

    Returns {label: {env_id: scores [runs]}}, [text, ...].
    """
    scores = defaultdict(dict)
    scales = []
    for env_id in dict.fromkeys(line.env_id for line in lines):
        lines_of_env = [line for line in lines if line.env_id == env_id]
        step = last_common_step(lines_of_env)
        if len(lines_of_env) == 1 or step is None:
            continue
        low = min(line.values.mean(0).min() for line in lines_of_env)
        high = max(values_at(line, step).mean() for line in lines_of_env)
        for line in lines_of_env:
            scores[line.label][env_id] = (values_at(line, step) - low) / ((high - low) or 1)
        bounds = f"{format_number(low)} to {format_number(high)}"
        scales.append(f"{escape(env_id)} at {step:,.0f} ({bounds})")
    return scores, scales


def compare_pair(lines, x_label, y_label):
    """The row of P(X > Y) for two labels, or None if they share no step in any environment."""
    line_of = {(line.label, line.env_id): line for line in lines}
    x_strata = []
    y_strata = []
    places = []
    for x_line in lines:
        y_line = line_of.get((y_label, x_line.env_id))
        if x_line.label != x_label or y_line is None:
            continue
        step = last_common_step((x_line, y_line))
        if step is not None:
            x_strata.append(values_at(x_line, step))
            y_strata.append(values_at(y_line, step))
            places.append(f"{x_line.env_id} at {step:,.0f}")
    if not places:
        return None
    probability = with_interval(x_strata + y_strata, improvement)
    return escape(x_label), escape(y_label), probability, join_names(places)


def table_of_runs(curves):
    """The table of all runs: how they were made, and their raw data."""
    rows = []
    for i, curve in enumerate(curves):
        name = escape(f"{curve.env_id}__{curve.label}__{curve.seed}.jsonl")
        button = f'<button data-raw="{i}" data-name="{name}">download</button>'
        rows.append([*describe_progress(curve), button, *describe_origin(curve)])
    head = ["environment", "line", "seed", "steps", "steps/s", "raw data"]
    head += ["versions", "commit", "path", "command"]
    return html_table(head, rows, (2, 3, 4))


def make_page(lines, left_out, est):
    """The text of the page."""
    estimates = {"mean": mean, "iqm": iqm}
    estimate = estimates[est]
    labels = list(dict.fromkeys(line.label for line in lines))
    env_ids = list(dict.fromkeys(line.env_id for line in lines))
    curves = [curve for line in lines for curve in line.curves]
    panels = []
    for number, env_id in enumerate(env_ids):
        lines_of_env = [line for line in lines if line.env_id == env_id]
        panels.append(draw_panel(number, lines_of_env, labels, estimate))
    data = {
        "panels": [panel.data for panel in panels],
        "raw": [pack(raw_data(curve)) for curve in curves],
    }
    return Template(PAGE).substitute(
        colors="".join(f"--c{i}: {color}; " for i, color in enumerate(COLORS)),
        classes="".join(f".c{i} {{ --c: var(--c{i}); }} " for i in range(len(COLORS))),
        counts=f"{count_noun(len(curves), 'run')} of {join_names(labels)} in {join_names(env_ids)}",
        estimate_name={"mean": "mean", "iqm": "interquartile mean"}[est],
        resamples=RESAMPLES,
        notes=list_notes(lines, left_out),
        panels="\n".join(panel.html for panel in panels),
        ends=table_of_ends(lines, estimate),
        published=table_of_published(lines, estimate),
        comparison=compare(lines, labels),
        runs=table_of_runs(curves),
        # No tag inside the data may end the script element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def list_notes(lines, left_out):
    """The box of notes: runs that differ in their flags, and what is left out."""
    notes = []
    for line in lines:
        notes += [escape(sentence) for sentence in describe_differences(line)]
    for path, reason in left_out:
        notes.append(f"Left out: <code>{escape(str(path))}</code>: {escape(reason)}.")
    if not notes:
        return ""
    items = "<li>".join(notes)
    return f"<aside><h2>Notes</h2><ul><li>{items}</ul></aside>"


# Templates. A name after $ is replaced.

PANEL = """<figure data-panel="$number"><h3>$env_id</h3>
<div class="plot" tabindex="0" role="group"
 aria-label="Curves of $labels on $env_id; the arrow keys read them">$grid
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"
 aria-label="Learning curves of $labels on $env_id">
<g class="band">$areas</g><g class="line">$paths</g></svg>
<div class="guide" hidden><span></span></div></div>
<figcaption aria-live="polite">$legend</figcaption></figure>"""

COMPARISON = """<section><h2>Over environments</h2>
<h3>Interquartile mean of scores</h3><p>Each environment is scored at the last step that all of its
lines cover. A score of 0 is the lowest mean on any of the curves, and a score of 1 is the highest
mean at that step: $scales. Compare only lines over the same environments.</p>
$ranks
<h3>Probability of improvement</h3><p>The probability that a run of X has a higher return than a run
of Y at the last step that both lines cover. Ties count half. It is averaged over the environments
that X and Y share.</p>
$pairs</section>"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Report: $counts</title>
<style>
:root { --paper: #fff; --ink: #1b1f24; --soft: #59626d; --rule: #e2e6ea; --tint: #f5f6f8; }
:root { $colors }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e7ea; --soft: #99a2ac; --rule: #2b3037; --tint: #1c2026; }
  :root { --c0: #3a93d0; --c6: #b9c0c8; }
}
$classes
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px clamp(16px, 4vw, 48px) 80px; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
h1 { font-size: 30px; }
h2 { font-size: 20px; margin-bottom: 8px; }
h3 { font-size: 15px; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 76ch; color: var(--soft); }
.counts { font-size: 17px; color: var(--ink); max-width: none; }
section { margin-top: 56px; } summary, button { cursor: pointer; } summary { margin-bottom: 12px; }
aside { margin-top: 28px; padding: 16px 20px; background: var(--tint);
  border-left: 3px solid var(--c4); }
aside h2 { font-size: 15px; } aside ul { margin: 0; padding-left: 18px; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 48px 56px; }
.panels { margin-top: 24px; }
figure { margin: 0; min-width: 0; } figure h3 { margin: 0 0 14px; }
.plot { position: relative; height: 270px; margin: 0 10px 34px 46px; cursor: crosshair;
  touch-action: pan-y; }
.plot:focus-visible { outline: 2px solid var(--c5); outline-offset: 6px; }
.plot > svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.band path { fill: var(--c); opacity: 0.16; } .plot path { vector-effect: non-scaling-stroke; }
.line path, .key path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line path { stroke-linecap: round; } .line [data-dot] { stroke-width: 8; }
.plot i { position: absolute; left: 0; right: 0; border-top: 1px solid var(--rule); }
.plot b { position: absolute; right: 100%; padding-right: 8px; transform: translateY(-50%); }
.plot u { position: absolute; top: 100%; padding-top: 8px; transform: translateX(-50%);
  text-decoration: none; }
.plot b, .plot u { font: 12px/1 system-ui, sans-serif; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.guide { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--soft);
  pointer-events: none; }
.guide s { position: absolute; width: 9px; height: 9px; margin: -4.5px 0 0 -5px;
  border-radius: 50%; }
.guide s { background: var(--c); box-shadow: 0 0 0 2px var(--paper); }
.guide span { position: absolute; bottom: 100%; transform: translateX(-50%); white-space: nowrap;
  font-size: 12px; }
.guide span { padding: 2px 8px; background: var(--ink); color: var(--paper); border-radius: 4px; }
[hidden] { display: none; }
.key { width: 24px; height: 8px; margin-right: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); } .n { text-align: right; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
figcaption td:nth-child(2) { white-space: normal; }
tr.near td { background: var(--tint); } code { font: 12.5px/1.5 ui-monospace, monospace; }
.soft, .tag { color: var(--soft); }
.tag { font-size: 12px; border: 1px solid; border-radius: 4px; padding: 0 4px; }
button { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--rule);
  border-radius: 4px; }
</style>
</head>
<body>
<main>
<header>
<h1>Report</h1>
<p class="counts">$counts</p>
<p>Undiscounted returns of deterministic evaluations, by environment steps. Each line is the
$estimate_name of its runs. Brackets and bands are 95 % intervals by stratified percentile bootstrap
with $resamples draws of the runs. With few seeds such an interval is too narrow, because it cannot
reach beyond the observed runs.</p>
</header>
$notes
<section><h2>Curves</h2><p>Point at a curve, or use the arrow keys, to read it. Each curve is drawn
at no more than about 200 steps.</p>
<noscript><p>Reading curves and downloading data need JavaScript.</p></noscript>
<div class="panels">
$panels
</div></section>
<section><h2>Where the lines end</h2><p>The $estimate_name of the runs at the last step that
all of them have reached, and the highest $estimate_name up to there. Steps/s is the median of the
runs, on the machines where they ran.</p>
$ends</section>
<section><h2>Beside published figures</h2><p>Both at the same step, if the line
covers it. A box names another version of the environment. Such figures are context and are never
pooled. Statistics differ between sources: stochastic training returns are lower than deterministic
evaluations, and highest returns are higher than final ones.</p>
$published</section>
$comparison
<section><h2>Runs</h2><p>A download is the run's metrics.jsonl, byte for byte, or its lines of a
file of raw curves.</p><details><summary>Commands, versions and raw data</summary>
$runs
</details></section>
</main>
<script id="data" type="application/json">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function indexOfSmallest(numbers) {
  return numbers.indexOf(Math.min(...numbers));
}

for (const figure of document.querySelectorAll("figure")) {
  const panel = data.panels[figure.dataset.panel];
  const plot = figure.querySelector(".plot");
  const guide = plot.querySelector(".guide");
  const bubble = guide.querySelector("span");
  const heading = figure.querySelector(".at");
  const rows = figure.querySelectorAll("tbody tr");
  const cells = [...rows].map((row) => row.lastChild);
  const textsAtEnd = [heading, ...cells].map((cell) => cell.textContent);
  const dots = panel.lines.map((line) => {
    const dot = guide.appendChild(document.createElement("s"));
    dot.className = "c" + line.color;
    return dot;
  });
  let shownStep = panel.x.length;

  // Show the values at step i. With a height in percent, emphasise the line nearest to it.
  function show(i, height) {
    shownStep = i;
    const distances = panel.lines.map((line) => {
      return line.y[i] === null ? Infinity : Math.abs(line.y[i] - height);
    });
    const nearest = indexOfSmallest(distances);
    guide.hidden = false;
    guide.style.left = panel.x[i] + "%";
    if (height === undefined) {
      bubble.textContent = panel.steps[i];
    } else {
      bubble.textContent = panel.lines[nearest].label + " " + panel.lines[nearest].text[i];
    }
    heading.textContent = "at step " + panel.steps[i];
    panel.lines.forEach((line, k) => {
      cells[k].textContent = line.text[i] ?? "–";
      dots[k].hidden = line.y[i] === null;
      dots[k].style.top = line.y[i] + "%";
      rows[k].classList.toggle("near", k === nearest && height !== undefined);
    });
    keepOnPage(bubble);
  }

  function hide() {
    shownStep = panel.x.length;
    guide.hidden = true;
    [heading, ...cells].forEach((cell, k) => {
      cell.textContent = textsAtEnd[k];
    });
    rows.forEach((row) => row.classList.remove("near"));
  }

  function showAtPointer(event) {
    const box = plot.getBoundingClientRect();
    const x = 100 * (event.clientX - box.left) / box.width;
    const height = 100 * (event.clientY - box.top) / box.height;
    show(indexOfSmallest(panel.x.map((position) => Math.abs(position - x))), height);
  }

  plot.addEventListener("pointermove", showAtPointer);
  plot.addEventListener("pointerdown", showAtPointer);
  plot.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") {
      hide();
    }
  });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const change = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (change) {
      event.preventDefault();
      show(Math.min(Math.max(shownStep + change, 0), panel.x.length - 1));
    }
  });
}

// Move a bubble sideways until it is 4 pixels inside the page.
function keepOnPage(bubble) {
  bubble.style.left = 0;
  const box = bubble.getBoundingClientRect();
  const pageWidth = document.documentElement.clientWidth;
  const moveRight = Math.max(0, 4 - box.left);
  const moveLeft = Math.min(0, pageWidth - 4 - box.right);
  bubble.style.left = moveRight + moveLeft + "px";
}

// Reverse pack() of report.py.
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt());
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const [keys, tables, order] = await new Response(stream).json();
  const columns = tables.map((table) => table.map(unpackColumn));
  const nextRow = tables.map(() => 0);
  const lines = order.map((k) => {
    const row = nextRow[k];
    nextRow[k] += 1;
    let line = keys[k][0];
    columns[k].forEach((column, i) => {
      line += column[row] + keys[k][i + 1];
    });
    return line;
  });
  return lines.join("\\n");
}

// Reverse pack_column() of report.py.
function unpackColumn(text) {
  if (text[0] !== "f") {
    return text.split(",");
  }
  return text.slice(1).split(",").map((digits) => {
    const number = Math.fround(digits);
    return Number.isInteger(number) ? number + ".0" : String(number);
  });
}

for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", async () => {
    const text = await unpack(data.raw[button.dataset.raw]);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/x-ndjson"}));
    link.download = button.dataset.name;
    link.click();
  });
}
</script>
</body>
</html>
"""


def main():
    """Report with the flags of the command line. Exit status 2 is bad input."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        report(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

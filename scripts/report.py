"""Make a report of runs: one page with their curves, figures, commands and raw data, which needs nothing but a browser.

    python scripts/report.py runs -o report.html                   all runs in a folder, at any depth
    python scripts/report.py results/mujoco.jsonl runs --est iqm   committed raw curves beside runs; interquartile means

What a run is, which runs make a line and how these are brought to the same steps is as in plot.py. A folder that is
broken or half-written is left out and named, here and on the page, with the reason; a run under way is shown as far as
it is. The page is the same, byte for byte, whenever it is made of the same files.

A line is the mean of its runs, or their interquartile mean (IQM: without the lowest and the highest quarter). Intervals
are 95 % percentile intervals of a stratified bootstrap: of each environment and line the runs are drawn anew, with
replacement. IQM and probability of improvement over environments: Agarwal et al. 2021, "Deep Reinforcement Learning at
the Edge of the Statistical Precipice", https://arxiv.org/abs/2108.13264. What others published is in
results/published.json.
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
from matplotlib.ticker import EngFormatter, MaxNLocator
from plot import COLORS, brief, curve, interpolate, read_runs

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.json"
VALUE = "eval/return"
RESAMPLES = 2000  # of a bootstrap
POINTS = 200  # steps at which a curve is drawn, at most: more than a screen tells apart
DASHES = ("", "7 4", "2 4")  # for more lines than there are colours
SELF = ("seed", "run_dir", "resume")  # flags in which the runs of a line may differ
short = EngFormatter(sep="")  # 200k, 1M


@dataclass
class Args:
    """Make a report of runs: one page with their curves, figures, commands and raw data."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders that are or contain runs, and .jsonl files of raw curves
    est: Literal["mean", "iqm"] = "mean"  # what a line shows of its runs
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("report.html")  # the page


class Line(NamedTuple):
    """The runs of one algorithm and experiment in one environment."""

    env_id: str
    label: str
    runs: list
    x: np.ndarray  # the steps which all of them cover [n]
    values: np.ndarray  # [runs, n]


# ---- statistics ------------------------------------------------------------------------------------------------------
def mean(values):
    """[..., n] -> [...]"""
    return values.mean(-1)


def iqm(values):
    """Interquartile mean: [..., n] -> [...]. A quarter that is no whole number is rounded down."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def pooled_iqm(strata):
    """Interquartile mean of all environments together: arrays [..., n] -> [...]."""
    return iqm(np.concatenate(strata, -1))


def improvement(strata):
    """P(X > Y), ties counting half, averaged over environments: X of each, then Y of each, [..., n] -> [...]."""
    half = len(strata) // 2
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(strata[:half], strata[half:])]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], 0)


def bootstrap(strata, statistic):
    """The 95 % percentile interval (low, high) of statistic(strata), the runs [n] of each stratum drawn anew."""
    rng = np.random.default_rng(0)
    drawn = statistic([runs[rng.integers(len(runs), size=(RESAMPLES, len(runs)))] for runs in strata])
    return np.quantile(drawn, (0.025, 0.975))


def tell(strata, statistic):
    """A statistic and its interval as the page shows them. Single runs have no interval."""
    value = brief(statistic(strata))
    if max(map(len, strata)) == 1:
        return value
    low, high = bootstrap(strata, statistic)
    return f"{value} [{brief(low)}, {brief(high)}]"


# ---- runs ------------------------------------------------------------------------------------------------------------
def points(run):
    """The evaluations of a run: steps [n], values [n]. ValueError says what is wrong with them, or with its config."""
    try:
        x, y = curve(run.rows, "step", VALUE)
    except (ValueError, TypeError):
        raise ValueError(f"a step or {VALUE} in it is not a number") from None
    if not len(x):
        raise ValueError(f"it has no {VALUE} yet")
    if not (np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError(f"a step or {VALUE} in it is not finite")
    try:
        describe(run)
    except (ValueError, TypeError, AttributeError):
        raise ValueError("its config.json or its rows are not what algos/ writes") from None
    return x, y


def gather(paths):
    """The lines, in the order of their finding, and what is left out: [(path, reason), ...]."""
    found, left_out, runs = defaultdict(dict), [], []
    for path in paths:
        places = {half.parent for name in ("config.json", "metrics.jsonl") for half in path.rglob(name)}
        for place in sorted(places) or [path]:
            try:
                runs += read_runs(place)
            except FileNotFoundError as error:
                left_out.append((place, f"it has no {Path(error.filename).name}"))
            except (OSError, ValueError) as error:
                left_out.append((place, str(error)))
    for run in runs:
        try:
            x, y = points(run)
        except ValueError as error:
            left_out.append((run.path, str(error)))
            continue
        same = str(run.seed), x.tobytes(), y.tobytes()  # a copy is no second run, nor one given twice
        first, _, _ = found[run.env_id, run.label].setdefault(same, (run, x, y))
        if Path(first.path).resolve() != Path(run.path).resolve():
            left_out.append((run.path, f"its seed and evaluations are those of {first.path}"))
    lines = []
    for (env_id, label), of in found.items():
        runs = [run for run, _, _ in of.values()]
        x, values = interpolate([(x, y) for _, x, y in of.values()])
        if len(x):
            lines.append(Line(env_id, label, runs, x, values))
        else:
            left_out += [(run.path, f"the runs of {label} on {env_id} share no step") for run in runs]
    return lines, left_out


def at(line, step):
    """What the runs of a line have at steps [...] that it covers: [runs, ...]."""
    return np.array([np.interp(step, line.x, run) for run in line.values])


def meeting(lines):
    """The last step that all of the lines cover; None where there is none."""
    step = min(line.x[-1] for line in lines)
    return step if step >= max(line.x[0] for line in lines) else None


def under_way(run):
    return bool(run.config) and not (Path(run.path) / "result.json").exists()


def count(n, noun):
    return f"{n} {noun}{'s' * (n != 1)}"


def size(line):
    """How many seeds a line has; in words where that is not all."""
    seeds, busy = len({str(run.seed) for run in line.runs}), sum(map(under_way, line.runs))
    of = "" if len(line.runs) == seeds else f"{len(line.runs)} runs of "
    return of + count(seeds, "seed") + f", {busy} under way" * (busy > 0)


def notes(line):
    """The flags in which the runs of a line differ, which are then not mere repetitions."""
    flags = [run.config["args"] for run in line.runs if run.config]
    for flag in dict.fromkeys(flag for args in flags for flag in args if flag not in SELF):
        used = dict.fromkeys(json.dumps(args.get(flag)) for args in flags)
        if len(used) > 1:
            yield f"{line.label} on {line.env_id}: its runs differ in {flag}: {' or '.join(used)}."


def last(run, metric):
    """The newest value of a metric in a run; None without."""
    return next((row[metric] for row in reversed(run.rows) if metric in row), None)


def describe(run):
    """A run, how far and how fast it got, and how it was made, in HTML."""
    config, steps, speed = run.config, f"{last(run, 'step'):,.0f}", last(run, "speed/sps")
    if under_way(run):
        steps += f" of {config['args'].get('total_timesteps', 0):,}, under way"
    speed = "–" if speed is None else f"{speed:,.0f}"
    command = escape(shlex.join(["python", *config["command"]])) if "command" in config else "–"
    versions = ", ".join(f"{package} {v}" for package, v in config.get("versions", {}).items() if v)
    commit = escape((config.get("commit") or "–")[:10])
    made = escape(versions), f"<code>{commit}</code>", escape(run.path), f"<code>{command}</code>"
    return (escape(run.env_id), escape(run.label), escape(str(run.seed)), steps, speed), made


def raw(run):
    """The raw data of a run: metrics.jsonl as it is, or its lines of a file of raw curves."""
    if run.config:
        return (Path(run.path) / "metrics.jsonl").read_bytes().decode(errors="replace")
    return "".join(json.dumps(row) + "\n" for row in run.rows)


# ---- packing ---------------------------------------------------------------------------------------------------------
def narrow(numbers):
    """A column of numbers, given as texts -> one text. What a float32 was comes in a float32's digits, behind an f."""
    wide = np.array(numbers, float)
    if (wide.astype(np.float32) == wide).all() and "-0.0" not in numbers:  # which JavaScript writes as 0
        texts = wide.astype(np.float32).astype(str)
        if [repr(x) for x in texts.astype(float).astype(np.float32).tolist()] == numbers:
            return "f" + ",".join(texts)
    return ",".join(numbers)


def pack(text):
    """The text of a JSONL file -> base64 of gzip, from which the page's unpack() makes the same text.

    Lines are split at their numbers. Lines alike in what is between share a table, stored column by column: with
    narrow() about 60 % of the lines compressed as they are.
    """
    tables, order = defaultdict(list), []
    for line in text.split("\n"):
        parts = re.split(r"(-?\d+(?:\.\d+)?)", line)
        tables[tuple(parts[::2])].append(parts[1::2])
        order.append(tuple(parts[::2]))
    places = {between: i for i, between in enumerate(tables)}
    with np.errstate(over="ignore"):
        columns = [[narrow(list(column)) for column in zip(*rows)] for rows in tables.values()]
    packed = json.dumps([list(tables), columns, [places[between] for between in order]], separators=(",", ":"))
    return base64.b64encode(gzip.compress(packed.encode(), mtime=0)).decode()


# ---- the page --------------------------------------------------------------------------------------------------------
def table(head, rows, numeric=()):
    """A table that scrolls inside of its box. Cells are HTML; columns in `numeric` are set to the right."""
    kind = ["n" if i in numeric else "" for i in range(len(head))]
    top = "".join(f'<th class="{k}">{title}</th>' for k, title in zip(kind, head))
    lines = ["".join(f'<td class="{k}">{cell}</td>' for k, cell in zip(kind, row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def names(texts):
    return escape(", ".join(texts))


def stroke(look):
    """Attributes of a path in the colour and the dashes of a line."""
    return f'class="c{look % len(COLORS)}" stroke-dasharray="{DASHES[look // len(COLORS) % len(DASHES)]}"'


def ticks(start, end):
    """Round numbers from start to end."""
    return [tick for tick in MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)).tick_values(start, end) if start <= tick <= end]


def draw(panel, lines, labels, estimate):
    """The panel of one environment: its HTML, and what hovering needs. Places are in percent, from the top left."""
    steps = np.unique(np.concatenate([line.x for line in lines]))
    keep = np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).round().astype(int)
    steps = np.unique([*steps[keep], *(line.x[end] for line in lines for end in (0, -1))])
    right = steps[-1] or 1
    across = np.round(100 * steps / right, 2)
    bounds = []
    for line in lines:
        inside = (line.x[0] <= steps) & (steps <= line.x[-1])
        columns = at(line, steps[inside]).T  # [steps, runs]
        ends = [bootstrap([runs], lambda drawn: estimate(drawn[0])) for runs in columns if len(runs) > 1]
        bounds.append((inside, estimate(columns), *(np.array(ends).T if ends else [estimate(columns)] * 2)))
    every = np.concatenate([np.concatenate(ends) for _, *ends in bounds])
    pad = 0.04 * (every.max() - every.min()) or 1
    bottom, top = every.min() - pad, every.max() + pad

    def down(y):
        return np.round(100 * (top - y) / (top - bottom), 2)

    def path(x, y):
        return "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x, down(y)))

    bands, curves, legend, hover = "", "", [], []
    for line, (inside, middle, low, high) in zip(lines, bounds):
        x, look, text = across[inside], labels.index(line.label), [brief(y) for y in middle]
        if len(line.runs) > 1:
            bands += f'<path {stroke(look)} d="{path([*x, *x[::-1]], np.concatenate((low, high[::-1])))}Z"/>'
            text = [f"{y} [{brief(a)}, {brief(b)}]" for y, a, b in zip(text, low, high)]
        curves += f'<path {stroke(look)}{" data-dot" * (len(x) == 1)} d="{path(x, middle)}h0"/>'
        key = f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path {stroke(look)} d="M1 4h22"/></svg>'
        legend.append((f"{key} {escape(line.label)}", size(line), text[-1]))
        y, texts = np.full((2, len(steps)), None)
        y[inside], texts[inside] = down(middle), text
        of = {"label": line.label, "color": look % len(COLORS)}
        hover.append(of | {"y": y.tolist(), "text": texts.tolist()})
    grid = "".join(
        f'<i style="top:{down(tick):g}%"><b>{short(tick) if abs(tick) >= 1e5 else f"{tick:g}"}</b></i>'
        for tick in ticks(bottom, top)
    )
    grid += "".join(f'<u style="left:{100 * tick / right:g}%">{short(tick)}</u>' for tick in ticks(0, right))
    env_id, of = escape(lines[0].env_id), names(line.label for line in lines)
    rows = table(("line", "", '<span class="at">at its end</span>'), legend, (2,))
    html = f"""<figure data-panel="{panel}"><h3>{env_id}</h3>
<div class="plot" tabindex="0" role="group" aria-label="Curves of {of} on {env_id}; arrow keys read them">{grid}
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="Learning curves of {of} on {env_id}">
<g class="band">{bands}</g><g class="line">{curves}</g></svg><div class="guide" hidden><span></span></div></div>
<figcaption aria-live="polite">{rows}</figcaption></figure>"""
    return html, {"x": across.tolist(), "steps": [f"{step:,.0f}" for step in steps], "lines": hover}


def finals(lines, estimate):
    """Where each line ends."""
    rows = []
    for line in lines:
        speeds = [speed for run in line.runs if (speed := last(run, "speed/sps")) is not None]
        final = tell([line.values[:, -1]], lambda drawn: estimate(drawn[0]))
        speed = f"{np.median(speeds):,.0f}" if speeds else "–"
        highest = brief(estimate(line.values.T).max())
        rows.append((escape(line.env_id), escape(line.label), size(line), f"{line.x[-1]:,.0f}", final, highest, speed))
    return table(("environment", "line", "runs", "until step", "final", "highest", "steps/s"), rows, range(3, 7))


def published(lines, estimate):
    """Our lines beside what others published of the same algorithm and environment, at the same step."""
    figures, rows = json.loads(PUBLISHED.read_bytes()), []
    for line in lines:
        env, algo = line.env_id.rpartition("-v")[0], line.label.partition(" ")[0]
        of = [row for row in figures if row["algo"] == algo and row["env_id"].rpartition("-v")[0] == env]
        covered = [row for row in of if line.x[0] <= row["step"] <= line.x[-1]]
        for row in covered or sorted(of, key=lambda row: abs(row["step"] - line.x[-1]))[:1]:
            ours = f'<span class="soft">ends at {line.x[-1]:,.0f}</span>'
            if covered:
                ours = tell([at(line, row["step"])], lambda drawn: estimate(drawn[0]))
            theirs = brief(row["value"]) + (f" ± {brief(row['spread'])}" if "spread" in row else "")
            other = "" if row["env_id"] == line.env_id else f' <span class="tag">{row["env_id"]}</span>'
            what = escape(line.env_id), escape(line.label), f"{row['step']:,}", ours, theirs + other
            rows.append((*what, str(row["seeds"]), escape(row["statistic"]), escape(row["source"])))
    head = "environment", "line", "step", "ours", "published", "seeds", "statistic", "source"
    return (
        table(head, rows, (2, 3, 4, 5)) if rows else "<p>Nothing is published of these environments and algorithms.</p>"
    )


def compare(lines, labels):
    """Over environments: IQM of each label, and the probability that one improves on another; "" with none shared."""
    scores, said = defaultdict(dict), []
    for env_id in dict.fromkeys(line.env_id for line in lines):
        of = [line for line in lines if line.env_id == env_id]
        step = meeting(of)
        if len(of) > 1 and step is not None:
            low, high = min(line.values.mean(0).min() for line in of), max(at(line, step).mean() for line in of)
            for line in of:
                scores[line.label][env_id] = (at(line, step) - low) / ((high - low) or 1)
            said.append(f"{escape(env_id)} at {step:,.0f} ({brief(low)} to {brief(high)})")
    ranks, pairs = [], []
    for label, of in scores.items():
        ranks.append((escape(label), tell([*of.values()], pooled_iqm), str(sum(map(len, of.values()))), names(of)))
    line_of = {(line.label, line.env_id): line for line in lines}
    for a, b in combinations(labels, 2):
        both = [(x, line_of[b, x.env_id]) for x in lines if x.label == a and (b, x.env_id) in line_of]
        met = [(x, y, step) for x, y in both if (step := meeting((x, y))) is not None]
        if met:
            strata = [at(x, step) for x, _, step in met] + [at(y, step) for _, y, step in met]
            where = names(f"{x.env_id} at {step:,.0f}" for x, _, step in met)
            pairs.append((escape(a), escape(b), tell(strata, improvement), where))
    if not pairs:
        return ""
    return f"""<section><h2>Over environments</h2>
<h3>Interquartile mean of scores</h3><p>Each environment counts at the last step which all of its lines cover. A score
is 0 at the lowest mean on any of their curves, and 1 at the highest mean at that step: {"; ".join(said)}. Compare those
over the same environments.</p>
{table(("line", "IQM", "runs", "environments"), ranks, (1, 2))}
<h3>Probability of improvement</h3><p>That a run of X returns more than one of Y at the last step which both lines
cover, ties counting half, averaged over the environments that they share.</p>
{table(("X", "Y", "P(X &gt; Y)", "environments"), pairs, (2,))}</section>"""


def catalogue(runs):
    """A row for each run: how it was made, and its raw data."""
    rows = []
    for place, run in enumerate(runs):
        what, made = describe(run)
        name = escape(f"{run.env_id}__{run.label}__{run.seed}.jsonl")
        button = f'<button data-raw="{place}" data-name="{name}">download</button>'
        rows.append((*what, button, *made))
    head = "environment", "line", "seed", "steps", "steps/s", "raw data", "versions", "commit", "path", "command"
    return table(head, rows, (2, 3, 4))


def main(args):
    """Write the page. Bad input raises SystemExit, which says what to do."""
    lines, left_out = gather(args.paths)
    for path, reason in left_out:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    if not lines:
        sys.exit("error: no run there: give folders of runs with evaluations, or .jsonl files of raw curves")
    estimate, word = {"mean": (mean, "mean"), "iqm": (iqm, "interquartile mean")}[args.est]
    labels = list(dict.fromkeys(line.label for line in lines))
    env_ids = list(dict.fromkeys(line.env_id for line in lines))
    runs = [run for line in lines for run in line.runs]
    panels = [
        draw(i, [line for line in lines if line.env_id == env_id], labels, estimate) for i, env_id in enumerate(env_ids)
    ]
    remarks = [escape(note) for line in lines for note in notes(line)]
    remarks += [f"Left out: <code>{escape(str(path))}</code>: {escape(reason)}." for path, reason in left_out]
    data = {"panels": [hover for _, hover in panels], "raw": [pack(raw(run)) for run in runs]}
    page = Template(PAGE).substitute(
        colors="".join(f"--c{i}: {color}; " for i, color in enumerate(COLORS)),
        classes="".join(f".c{i} {{ --c: var(--c{i}); }} " for i in range(len(COLORS))),
        counts=f"{count(len(runs), 'run')} of {names(labels)} in {names(env_ids)}",
        word=word,
        resamples=RESAMPLES,
        remarks=f"<aside><h2>Notes</h2><ul><li>{'<li>'.join(remarks)}</ul></aside>" if remarks else "",
        panels="\n".join(html for html, _ in panels),
        finals=finals(lines, estimate),
        published=published(lines, estimate),
        compare=compare(lines, labels),
        catalogue=catalogue(runs),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page, encoding="utf-8", errors="replace")  # names of folders may be any bytes
    print(args.output)


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
:root { --paper: #fff; --ink: #1b1f24; --soft: #59626d; --rule: #e2e6ea; --tint: #f5f6f8; $colors }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e7ea; --soft: #99a2ac; --rule: #2b3037; --tint: #1c2026; }
  :root { --c0: #3a93d0; --c6: #b9c0c8; }
}
$classes
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px clamp(16px, 4vw, 48px) 80px; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
h1 { font-size: 30px; } h2 { font-size: 20px; margin-bottom: 8px; } h3 { font-size: 15px; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 76ch; color: var(--soft); }
.counts { font-size: 17px; color: var(--ink); max-width: none; }
section { margin-top: 56px; } summary, button { cursor: pointer; } summary { margin-bottom: 12px; }
aside { margin-top: 28px; padding: 16px 20px; background: var(--tint); border-left: 3px solid var(--c4); }
aside h2 { font-size: 15px; } aside ul { margin: 0; padding-left: 18px; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 48px 56px; }
.panels { margin-top: 24px; }
figure { margin: 0; min-width: 0; } figure h3 { margin: 0 0 14px; }
.plot { position: relative; height: 270px; margin: 0 10px 34px 46px; cursor: crosshair; touch-action: pan-y; }
.plot:focus-visible { outline: 2px solid var(--c5); outline-offset: 6px; }
.plot > svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.band path { fill: var(--c); opacity: 0.16; } .plot path { vector-effect: non-scaling-stroke; }
.line path, .key path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line path { stroke-linecap: round; } .line [data-dot] { stroke-width: 8; }
.plot i { position: absolute; left: 0; right: 0; border-top: 1px solid var(--rule); }
.plot b { position: absolute; right: 100%; padding-right: 8px; transform: translateY(-50%); }
.plot u { position: absolute; top: 100%; padding-top: 8px; transform: translateX(-50%); text-decoration: none; }
.plot b, .plot u { font: 12px/1 system-ui, sans-serif; color: var(--soft); font-variant-numeric: tabular-nums; }
.guide { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--soft); pointer-events: none; }
.guide s { position: absolute; width: 9px; height: 9px; margin: -4.5px 0 0 -5px; border-radius: 50%; }
.guide s { background: var(--c); box-shadow: 0 0 0 2px var(--paper); }
.guide span { position: absolute; bottom: 100%; transform: translateX(-50%); white-space: nowrap; font-size: 12px; }
.guide span { padding: 2px 8px; background: var(--ink); color: var(--paper); border-radius: 4px; }
[hidden] { display: none; } .key { width: 24px; height: 8px; margin-right: 4px; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); } .n { text-align: right; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; } figcaption td:nth-child(2) { white-space: normal; }
tr.near td { background: var(--tint); } code { font: 12.5px/1.5 ui-monospace, monospace; }
.soft, .tag { color: var(--soft); } .tag { font-size: 12px; border: 1px solid; border-radius: 4px; padding: 0 4px; }
button { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--rule); border-radius: 4px; }
</style>
</head>
<body>
<main>
<header>
<h1>Report</h1>
<p class="counts">$counts</p>
<p>Undiscounted returns of deterministic evaluations, by environment steps. Lines are the $word of their runs;
brackets and bands are 95 % intervals by stratified percentile bootstrap ($resamples draws of the runs). With a few
seeds such an interval is too narrow, since it cannot reach beyond the runs that there are.</p>
</header>
$remarks
<section><h2>Curves</h2><p>Point at a curve, or take the arrow keys, to read it. Each is drawn at about 200
steps at most.</p>
<noscript><p>Reading curves and downloading data take JavaScript.</p></noscript>
<div class="panels">
$panels
</div></section>
<section><h2>Where the lines end</h2><p>The $word of the runs at the last step that all of them have reached, and the
highest on the way there. Steps/s: the median of the runs, on the machines they ran on.</p>
$finals</section>
<section><h2>Beside published figures</h2><p>At the same step, where a line covers it. Other versions of an environment
are named in a box, and are context: they are never pooled. Statistics differ between sources: stochastic training
returns are lower than deterministic evaluations, and highest ones higher than final ones.</p>
$published</section>
$compare
<section><h2>Runs</h2><p>A download is the run's metrics.jsonl, to the last byte, or its lines of a file of raw
curves.</p><details><summary>Commands, versions and raw data</summary>
$catalogue
</details></section>
</main>
<script id="data" type="application/json">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

for (const figure of document.querySelectorAll("figure")) {
  const panel = data.panels[figure.dataset.panel], plot = figure.querySelector(".plot");
  const guide = plot.querySelector(".guide"), bubble = guide.querySelector("span"), at = figure.querySelector(".at");
  const rows = figure.querySelectorAll("tbody tr"), cells = [...rows].map((row) => row.lastChild);
  const before = [at, ...cells].map((cell) => cell.textContent);
  const dots = panel.lines.map((line) => guide.appendChild(document.createElement("s")));
  panel.lines.forEach((line, k) => dots[k].className = "c" + line.color);
  let here = panel.x.length;

  function show(i, height) {  // the values at step i, and more of the line nearest to a height in percent
    here = i;
    const away = panel.lines.map((line) => line.y[i] === null ? Infinity : Math.abs(line.y[i] - height));
    const near = away.indexOf(Math.min(...away)), line = panel.lines[near];
    guide.hidden = false;
    guide.style.left = panel.x[i] + "%";
    bubble.textContent = height === undefined ? panel.steps[i] : line.label + " " + line.text[i];
    bubble.style.left = 0;
    at.textContent = "at step " + panel.steps[i];
    panel.lines.forEach((line, k) => {
      cells[k].textContent = line.text[i] ?? "–";
      dots[k].hidden = line.y[i] === null;
      dots[k].style.top = line.y[i] + "%";
      rows[k].classList.toggle("near", k === near && height !== undefined);
    });
    const box = bubble.getBoundingClientRect(), page = document.documentElement.clientWidth;
    bubble.style.left = Math.max(0, 4 - box.left) + Math.min(0, page - 4 - box.right) + "px";
  }

  function hide() {
    here = panel.x.length;
    guide.hidden = true;
    [at, ...cells].forEach((cell, k) => cell.textContent = before[k]);
    rows.forEach((row) => row.classList.remove("near"));
  }

  function seek(event) {
    const box = plot.getBoundingClientRect(), x = 100 * (event.clientX - box.left) / box.width;
    const away = panel.x.map((place) => Math.abs(place - x));
    show(away.indexOf(Math.min(...away)), 100 * (event.clientY - box.top) / box.height);
  }

  plot.addEventListener("pointermove", seek);
  plot.addEventListener("pointerdown", seek);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) {
      event.preventDefault();
      show(Math.min(Math.max(here + by, 0), panel.x.length - 1));
    }
  });
}

async function unpack(packed) {  // undoes pack() of report.py
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt());
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const [betweens, columns, order] = await new Response(stream).json();
  const exact = (x) => Number.isInteger(x) ? x + ".0" : String(x);
  const wide = (text) => text[0] === "f" ? text.slice(1).split(",").map((x) => exact(Math.fround(x))) : text.split(",");
  const cells = columns.map((table) => table.map(wide)), next = columns.map(() => 0);
  return order.map((k) => {
    const i = next[k]++;
    return betweens[k].map((between, slot) => slot ? cells[k][slot - 1][i] + between : between).join("");
  }).join("\\n");
}

for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", async () => {
    const link = document.createElement("a"), text = await unpack(data.raw[button.dataset.raw]);
    link.href = URL.createObjectURL(new Blob([text], {type: "application/x-ndjson"}));
    link.download = button.dataset.name;
    link.click();
  });
}
</script>
</body>
</html>
"""


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except OSError as error:
        sys.exit(f"error: {error}")

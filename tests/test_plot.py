"""scripts/plot.py on real runs and on files written by the tests."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import plot
import pytest
from conftest import ROOT

SMALL_RUN = (
    "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 300 --buffer-size 400 "
    "--hidden 16 16 --batch-size 16 --device cpu --threads 1 --eval-every 200 --eval-episodes 2"
)
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.stem != "common")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder that holds, two levels down, a run of each of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    processes = []
    for seed in ("1", "2"):
        command = [sys.executable, "algos/sac.py", *SMALL_RUN.split(), "--seed", seed]
        command += ["--run-dir", str(folder / "pendulum" / f"seed-{seed}")]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def run_command(*args):
    """Run plot.py as a user does."""
    command = [sys.executable, "scripts/plot.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def write_run(folder, env_id="A-v0", algo="sac", seed=1, points=(), exp_name=None, tail=""):
    """Write a run folder with eval/return at the given (step, value)."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": exp_name or algo, "seed": seed}
    (folder / "config.json").write_text(json.dumps({"algo": algo, "args": args}))
    rows = [{"step": step, "wall": step / 10, "eval/return": value} for step, value in points]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def draw(tmp_path, *paths, **flags):
    """The pixels of the figure that plot draws [H, W, 3], from 0 to 1."""
    output = tmp_path / "figures" / "a.png"
    plot.plot(plot.Args(paths, output=output, **flags))
    return plot.plt.imread(output)[..., :3]


def count_pixels(pixels, color):
    """The number of pixels with exactly this colour, such as "#0072B2"."""
    target = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(pixels - target) < 0.004).all(-1).sum())


def collect_lines(*paths, **flags):
    """The lines that plot collects."""
    return plot.collect(plot.Args(paths, **flags))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_of_a_script_is_explained(path):
    """The help text of a flag is the comment on its line."""
    text = path.read_text()
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name == "Args"]
    flags = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    assert flags
    for flag in flags:
        assert "  # " in text.splitlines()[flag.end_lineno - 1], flag.target.id


def test_the_command_draws_two_seeds_as_one_line(runs, tmp_path):
    """Given the folder above: one line with a band, and its numbers in the table."""
    output = tmp_path / "figures" / "curves.png"
    process = run_command(runs, "--output", output)
    assert process.returncode == 0
    assert process.stderr == ""
    final = []
    for path in runs.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        final += [row["eval/return"] for row in rows if row["step"] == 400 and "eval/return" in row]
    assert len(final) == 2
    half_interval = 12.7062 * np.std(final, ddof=1) / math.sqrt(2)
    head, line, last = process.stdout.splitlines()
    assert head.split() == ["environment", "line", "runs", "until", "final", "highest"]
    assert last == str(output)
    cells = line.split()
    assert cells[:4] == ["Pendulum-v1", "sac", "2", "400"]
    assert cells[5] == "+-"
    assert float(cells[4]) == pytest.approx(np.mean(final), abs=0.51)
    assert float(cells[6]) == pytest.approx(half_interval, rel=1e-3)
    pixels = plot.plt.imread(output)[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert count_pixels(pixels, plot.COLORS[0]) > 300
    assert count_pixels(pixels, plot.COLORS[1]) == 0


# Statistics


def test_smooth_averages_the_points_around_each_point():
    y = np.array([1.0, 2.0, 6.0, 4.0, 0.0])
    assert plot.smooth(y, 1).tolist() == y.tolist()
    assert plot.smooth(y, 3).tolist() == [1.5, 3.0, 4.0, 10 / 3, 2.0]
    assert plot.smooth(y, 2).tolist() == [1.0, 1.5, 4.0, 5.0, 2.0]
    assert plot.smooth(y, 99).tolist() == [2.6] * 5
    assert plot.smooth(np.full(7, 3.0), 4).tolist() == [3.0] * 7  # the ends are not pulled to 0


def test_metric_points_skip_rows_without_the_metric_and_average_equal_steps():
    rows = [
        {"step": 20, "a": 4},
        {"step": 10, "a": 1},
        {"step": 20, "a": 8},
        {"step": 30, "b": 9},
        {"a": 7},
    ]
    x, y = plot.metric_points(rows, "step", "a")
    assert x.tolist() == [10, 20]
    assert y.tolist() == [1, 6]
    x, y = plot.metric_points(rows, "step", "c")
    assert x.tolist() == []
    assert y.tolist() == []


def test_interpolate_at_all_steps_in_the_range_that_every_run_covers():
    first = (np.array([0.0, 10, 30]), np.array([0.0, 10, 50]))
    second = (np.array([10.0, 20, 40]), np.array([1.0, 3, 7]))
    x, values = plot.interpolate([first, second])
    assert x.tolist() == [10, 20, 30]
    assert values.tolist() == [[10, 30, 50], [1, 3, 5]]
    apart = (np.array([50.0]), np.array([0.0]))
    x, _ = plot.interpolate([first, apart])
    assert x.tolist() == []


def test_intervals_agree_with_printed_tables_of_students_t():
    table = ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (100, 1.98397))
    for df, t in table:
        assert plot.student_t(df) == pytest.approx(t, abs=1e-4)
    values = np.array([[1.0, 5], [2.0, 5], [3.0, 5]])
    assert plot.half_band(values, "std").tolist() == [1, 0]
    interval = [4.30265 / math.sqrt(3), 0]
    assert plot.half_band(values, "ci").tolist() == pytest.approx(interval, abs=1e-4)
    assert plot.half_band(values[:1], "ci").tolist() == [0, 0]


# Lines


def test_lines_never_pool_environments(tmp_path):
    """A line is one environment, algorithm and experiment. Each run is smoothed on its own."""
    points = [(0, 0.0), (10, 3.0), (20, 9.0)]
    write_run(tmp_path / "a1", seed=1, points=points)
    write_run(tmp_path / "deep" / "er" / "a2", seed=2, points=points[:2])
    write_run(tmp_path / "b", env_id="B-v0", points=points)
    write_run(tmp_path / "td3", algo="td3", points=points)
    write_run(tmp_path / "wide", exp_name="wide", points=points)
    # The second path finds a1 again, which counts once.
    args = plot.Args((tmp_path, tmp_path / "b" / ".." / "a1"), smooth=3)
    lines = plot.collect(args)
    sizes = {}
    for env_id, by_label in lines.items():
        sizes[env_id] = {label: len(curves) for label, curves in by_label.items()}
    assert sizes == {"A-v0": {"sac": 2, "td3": 1, "sac wide": 1}, "B-v0": {"sac": 1}}
    _, smoothed = lines["B-v0"]["sac"][0]
    assert smoothed.tolist() == [1.5, 4, 6]
    aligned = plot.align(lines, "step")
    x, values = aligned["A-v0"]["sac"]
    assert x.tolist() == [0, 10]
    assert values.tolist() == [[1.5, 4], [1.5, 1.5]]
    table = plot.tabulate(aligned, args, "steps")
    assert table[1] == ("A-v0", "sac", "2", "10", "2.75 +- 15.88", "2.75")  # 12.7062 * 1.25
    assert table[4] == ("B-v0", "sac", "1", "20", "6", "6")
    seconds, _ = collect_lines(tmp_path, x="wall")["B-v0"]["sac"][0]
    assert seconds.tolist() == [0, 1, 2]


def test_select_exclude_and_legend(tmp_path):
    for name in ("fast/x", "fast/y", "slow/x"):
        points = [(0, 0.0), (10, 3.0)]
        write_run(tmp_path / name, seed=len(name), exp_name=name[:4], points=points)

    def sizes(*paths, **flags):
        by_label = collect_lines(*paths, **flags)["A-v0"]
        return {label: len(curves) for label, curves in by_label.items()}

    slow = tmp_path / "slow"
    fast = tmp_path / "fast"
    assert sizes(tmp_path) == {"sac fast": 2, "sac slow": 1}
    assert sizes(tmp_path, select=("fast", "/x")) == {"sac fast": 1}
    assert sizes(tmp_path, exclude=("fast/y", "slow")) == {"sac fast": 1}
    assert sizes(slow, fast, legend=("one", "two")) == {"one": 1, "two": 2}
    with pytest.raises(ValueError, match="--legend has 1 names for 2 paths"):
        sizes(slow, fast, legend=("one",))
    with pytest.raises(ValueError, match="no run found"):
        sizes(tmp_path, select=("nonesuch",))


# Figures


def test_estimates_and_bands(tmp_path):
    """--est says where the line lies. Only a mean has a band."""
    for seed, value in enumerate((0.0, 1.0, 8.0)):
        write_run(tmp_path / str(seed), seed=seed, points=[(0, value), (100, value)])
    lines = plot.align(collect_lines(tmp_path), "step")
    for est, level, bands in (("mean", 3, 1), ("median", 1, 0), ("max", 8, 0), ("min", 0, 0)):
        figure = plot.draw(lines, plot.Args((tmp_path,), est=est, count=True), "steps")
        (axis,) = figure.axes
        assert axis.get_lines()[0].get_ydata().tolist() == [level, level]
        assert len(axis.collections) == bands
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sac (3)"]
        assert axis.get_title() == "A-v0"
        assert axis.get_xlabel() == "environment steps"
        assert axis.get_ylabel() == "eval/return"
        plot.plt.close(figure)
    for band, half in (("std", 19**0.5), ("ci", 4.30265 * (19 / 3) ** 0.5)):
        figure = plot.draw(lines, plot.Args((tmp_path,), band=band), "steps")
        heights = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(3 - half, 1e-4)
        assert heights.max() == pytest.approx(3 + half, 1e-4)
        plot.plt.close(figure)


def test_panels_share_the_colour_of_a_line(tmp_path, capsys):
    """One panel per environment. Times have the unit that suits them."""
    env_ids = ["A-v0", "B-v0", "C-v0", "D-v0", "E-v0"]
    for env_id in env_ids:
        write_run(tmp_path / env_id / "td3", env_id, "td3", points=[(0, 1.0), (200_000, 3.0)])
        if env_id != "A-v0":
            write_run(tmp_path / env_id / "sac", env_id, "sac", points=[(0, 1.0), (200_000, 2.0)])
    pixels = draw(tmp_path, tmp_path, x="wall")
    assert count_pixels(pixels, plot.COLORS[0]) > 300
    assert count_pixels(pixels, plot.COLORS[1]) > 300
    assert count_pixels(pixels, plot.COLORS[2]) == 0
    assert "5.6 hours" in capsys.readouterr().out
    lines = plot.align(collect_lines(tmp_path), "step")
    figure = plot.draw(lines, plot.Args((tmp_path,)), "steps")
    assert [axis.get_title() for axis in figure.axes] == env_ids
    colors = [[line.get_color() for line in axis.get_lines()] for axis in figure.axes]
    # TD3 is found first, so it has the first colour.
    td3_color = plot.COLORS[0]
    sac_color = plot.COLORS[1]
    assert colors == [[td3_color]] + [[sac_color, td3_color]] * 4
    plot.plt.close(figure)


def test_a_torn_last_line_is_ignored_and_a_missing_metric_is_named(tmp_path, capsys):
    """A run under way may end in half a line. Half a line in the middle is damage."""
    tail = '{"step": 20, "eval/re'
    write_run(tmp_path / "run", points=[(0, 1.0), (10, 2.0)], tail=tail)
    tail = '{"step": 1, "wall": 0.1, "episode/return": 3.0}\n'
    write_run(tmp_path / "young", seed=2, tail=tail)
    assert count_pixels(draw(tmp_path, tmp_path), plot.COLORS[0]) > 300
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == ["A-v0", "sac", "1", "10", "2", "2"]
    warning = f"warning: left out, without eval/return by step: {tmp_path / 'young'}\n"
    assert captured.err == warning
    error = "no run has loss/x by step: choose --value from episode/return, eval/return$"
    with pytest.raises(ValueError, match=error):
        draw(tmp_path, tmp_path, value="loss/x")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is not JSON"):
        draw(tmp_path, tmp_path)


# Raw curves


def test_raw_curves_are_told_apart_by_environment_algorithm_and_seed(tmp_path, capsys):
    path = tmp_path / "raw.jsonl"
    runs = [("A-v0", "sac", 1, 5), ("A-v0", "sac", 2, 7), ("A-v0", "td3", 1, 1)]
    runs.append(("B-v0", "sac", 1, 9))
    lines = []
    for step in (500_000, 1_000_000):
        for env_id, algo, seed, value in runs:
            row = {"algo": algo, "env_id": env_id, "seed": seed, "step": step}
            lines.append(json.dumps(row | {"eval/return": value + step / 1e6}) + "\n")
    path.write_text("".join(lines))
    pixels = draw(tmp_path, path)
    assert count_pixels(pixels, plot.COLORS[0]) > 300
    assert count_pixels(pixels, plot.COLORS[1]) > 300
    table = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert table == [
        ["A-v0", "sac", "2", "1M", "7 +- 12.71", "7"],
        ["A-v0", "td3", "1", "1M", "2", "2"],
        ["B-v0", "sac", "1", "1M", "10", "10"],
    ]
    assert list(collect_lines(path, select=("B-v0__sac",))) == ["B-v0"]
    with pytest.raises(
        ValueError, match="no run has eval/return by wall: no row has a metric and a wall"
    ):
        draw(tmp_path, path, x="wall")


def test_saved_curves_draw_the_same_figure(tmp_path):
    """--save writes the points before smoothing, as plot.py reads them."""
    for seed in (1, 2):
        points = [(0, 1.0), (10, 2.0 * seed), (20, 5.0)]
        write_run(tmp_path / str(seed), seed=seed, points=points)
    saved = tmp_path / "raw.jsonl"
    from_runs = draw(tmp_path, tmp_path, smooth=3, save=saved)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    origin = {"algo": "sac", "env_id": "A-v0", "seed": 2, "commit": None, "versions": None}
    assert rows[4] == origin | {"step": 10, "eval/return": 4.0}
    assert len(rows) == 6
    assert (draw(tmp_path, saved, smooth=3) == from_runs).all()


def test_saved_curves_keep_commit_and_versions(runs, tmp_path):
    """They come from the run's config.json, and survive saving a saved file again."""
    saved = tmp_path / "raw.jsonl"
    saved_again = tmp_path / "again.jsonl"
    draw(tmp_path, runs, save=saved)
    draw(tmp_path, saved, save=saved_again)
    assert saved_again.read_text() == saved.read_text()
    config = json.loads((runs / "pendulum" / "seed-1" / "config.json").read_text())
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["commit"] == config["commit"]
        assert row["versions"] == config["versions"]
        assert row["versions"]["torch"]


def test_committed_curves_name_commit_and_versions():
    """Every row of results/ has both, null if unknown."""
    keys = {"algo", "env_id", "seed", "commit", "versions", "step", "eval/return"}
    paths = [path for path in (ROOT / "results").glob("*.jsonl") if path.stem != "speed"]
    assert len(paths) >= 6
    for path in paths:
        for row in common.read_rows(path):
            assert set(row) == keys


# Errors


def test_paths_that_are_no_runs_are_errors(tmp_path):
    def check_error(match, *paths):
        with pytest.raises(ValueError, match=match):
            draw(tmp_path, *paths)

    check_error("give folders")
    check_error("neither a folder nor", tmp_path / "nonesuch")
    check_error("no run found", tmp_path)
    write_run(tmp_path / "one", points=[(0, 1.0), (10, 2.0)])
    metrics = tmp_path / "one" / "metrics.jsonl"
    check_error("lacks env_id, algo or seed.* give its folder", metrics)
    (tmp_path / "one" / "config.json").write_text("{}")
    check_error("is not the config of a run", tmp_path)


def test_bad_flags_are_errors(tmp_path):
    with pytest.raises(ValueError, match="--smooth is 0"):
        draw(tmp_path, tmp_path, smooth=0)
    with pytest.raises(ValueError, match="must end in .png"):
        plot.plot(plot.Args((tmp_path,), output=Path("a.xyz")))
    path = tmp_path / "raw.jsonl"
    path.write_text('{"env_id": "A-v0", "algo": "sac", "seed": 1, "step": 1, "commit": "a1"}\n')
    with pytest.raises(ValueError, match="step or commit is not a number in .*raw.jsonl"):
        draw(tmp_path, path, value="commit")


def test_runs_with_the_same_seed_or_without_a_common_step(tmp_path, capsys):
    write_run(tmp_path / "one", points=[(0, 1.0), (10, 2.0)])
    write_run(tmp_path / "two", points=[(20, 1.0)])
    with pytest.raises(ValueError, match="runs of sac on A-v0 share no step"):
        draw(tmp_path, tmp_path)
    assert "warning: sac on A-v0 has runs with the same seed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--save would merge runs: sac on A-v0"):
        draw(tmp_path, tmp_path, save=tmp_path / "saved.jsonl")
    assert not (tmp_path / "saved.jsonl").exists()


def test_the_command_prints_an_error_as_one_line():
    process = run_command()
    assert process.returncode == 2
    assert process.stderr == "error: give folders of runs, or .jsonl files of raw curves\n"

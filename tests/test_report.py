"""scripts/report.py: its statistics against scipy's, and its page in a real browser."""

import base64
import gzip
import html
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import report
from conftest import ROOT

HOSTILE_LABEL = "</script><script>alert(1)</script>"


def write_run(
    folder, env_id="A-v0", algo="sac", seed=1, points=(), finished=True, tail="", **flags
):
    """Write a run folder with eval/return at the given (step, value) and rows of other metrics."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": algo, "seed": seed, "total_timesteps": 3000, **flags}
    config = {
        "algo": algo,
        "args": args,
        "command": ["algos/a.py", "--seed", str(seed), "--x", "a b"],
        "commit": "0123456789abcdef",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "mujoco": None},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step, value in points:
        loss = float(np.float32(value / 3))
        losses = {"loss/a": loss, "loss/b": -0.0, "loss/c": 1e-7, "speed/sps": 60.5}
        for metrics in (
            {"episode/return": value / 7, "episode/length": 7.0},
            losses,
            {"eval/return": value},
        ):
            lines.append(json.dumps({"step": step, "wall": step / 7} | metrics) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + tail)
    if finished:
        (folder / "result.json").write_text("{}")


def make_page(tmp_path, *paths, **flags):
    """The page that report.py makes of the paths, or of tmp_path/runs."""
    output = tmp_path / "report.html"
    report.report(report.Args(paths or (tmp_path / "runs",), output=output, **flags))
    return output.read_text()


def visible_text(page):
    """The text that a reader of a page sees."""
    body = page.split("<script")[0].split("</style>")[-1]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


# Statistics


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 11])
def test_iqm_agrees_with_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(size=(3, n))
    expected = stats.trim_mean(values, 0.25, axis=-1)
    assert np.allclose(report.iqm(values), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "iqm"])
def test_the_bootstrap_of_one_stratum_agrees_with_scipy(name):
    """The ends of two intervals of 2000 draws differ by chance.

    The standard error of an end is 3 to 4 % of the interval's width.
    """
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).gumbel(size=12)

    def scipy_iqm(x, axis):
        return stats.trim_mean(x, 0.25, axis=axis)

    statistic = {"mean": np.mean, "iqm": scipy_iqm}[name]
    theirs = stats.bootstrap(
        (values,), statistic, n_resamples=50_000, method="percentile", rng=0
    ).confidence_interval
    ours = report.bootstrap([values], getattr(report, name))
    tolerance = 0.08 * (theirs.high - theirs.low)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_the_bootstrap_of_two_strata_draws_within_each():
    """A loop is the reference. Drawing from both together would widen the interval threefold."""
    rng = np.random.default_rng(2)
    strata = [rng.normal(0, 1, 6), rng.normal(10, 1, 9)]
    estimates = []
    for _ in range(10_000):
        drawn = [value for runs in strata for value in rng.choice(runs, len(runs))]
        dropped = len(drawn) // 4
        estimates.append(np.mean(sorted(drawn)[dropped : len(drawn) - dropped]))
    low, high = np.quantile(estimates, (0.025, 0.975))
    interval = report.bootstrap(strata, report.pooled_iqm)
    assert interval == pytest.approx((low, high), abs=0.08 * (high - low))


def test_improvement_agrees_with_mann_whitney():
    """With ties, averaged over two environments."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    x_strata = [rng.integers(0, 5, n).astype(float) for n in (4, 7)]
    y_strata = [rng.integers(0, 5, n).astype(float) for n in (5, 3)]
    probabilities = []
    for x, y in zip(x_strata, y_strata, strict=True):
        probabilities.append(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
    expected = np.mean(probabilities)
    assert report.improvement(*x_strata, *y_strata) == pytest.approx(expected, abs=1e-12)
    assert report.improvement(*y_strata, *x_strata) == pytest.approx(1 - expected, abs=1e-12)


# Numbers on the page


def test_curves_ends_published_figures_and_comparisons_match_hand_calculation(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed, end in ((1, 4000.0), (2, 6000.0), (3, 8000.0), (4, 9000.0)):
        points = [(0, 0.0), (50_000, 0.0), (200_000, end)]
        write_run(runs / f"sac-{seed}", "Hopper-v4", "sac", seed, points)
    for seed in (1, 2):
        points = [(0, 0.0), (100_000, 1500.0 * seed)]
        write_run(runs / f"td3-{seed}", "Hopper-v4", "td3", seed, points)
        points = [(0, 0.0), (250_000, 1.0)]
        write_run(runs / f"other-{seed}", "Hopper-v5", "td3", seed, points, finished=seed > 1)
    text = visible_text(make_page(tmp_path))
    assert "8 runs of td3, sac in Hopper-v5, Hopper-v4" in text
    assert re.search(r"Hopper-v4 sac 4 seeds 200,000 6750 \[\d+, \d+\] 6750 60 ", text)
    assert "Hopper-v5 td3 2 seeds, 1 under way 250,000 1 [1, 1] 1 60 " in text
    # Ours at the published steps, 100k and 200k. The page names another version of the
    # environment, and a line that ends earlier.
    source = "10 mean, deterministic evaluation SBX, raw curves"
    assert re.search(rf"Hopper-v4 sac 100,000 2250 \[\d+, \d+\] 1103 {source}", text)
    assert re.search(rf"Hopper-v4 sac 200,000 6750 \[\d+, \d+\] 2342 {source}", text)
    source = "2031 Hopper-v1 10 mean, deterministic evaluation TD3's"
    assert f"Hopper-v5 td3 250,000 1 [1, 1] {source} authors" in text
    assert f"Hopper-v4 td3 250,000 ends at 100,000 {source}" in text
    # At 100k SAC has 1333, 2000, 2667, 3000, and TD3 1500, 3000: P(TD3 > SAC) = 4.5 / 8.
    assert "Hopper-v4 at 100,000 (0 to 2250)" in text
    assert "Hopper-v5 at" not in text
    assert re.search(r"td3 sac 0.5625 \[[\d.]+, [\d.]+\] Hopper-v4 at 100,000", text)
    assert re.search(r"sac 1.037 \[[\d.]+, [\d.]+\] 4 Hopper-v4", text)
    origin = f"python 3.11.7, torch 2.13.0 0123456789 {runs}/td3-2 python algos/a.py --seed 2"
    assert f"{origin} --x 'a b' " in text
    text = visible_text(make_page(tmp_path, est="iqm"))
    assert re.search(r"Hopper-v4 sac 4 seeds 200,000 7000 \[", text)
    assert capsys.readouterr().err == ""


def test_published_figures_name_their_source():
    figures = json.loads(report.PUBLISHED.read_bytes())
    keys = {"algo", "env_id", "step", "value", "seeds", "statistic", "source"}
    assert len(figures) > 100
    origins = set()
    for figure in figures:
        assert keys <= figure.keys() <= keys | {"spread"}
        assert re.fullmatch(r"\w+-v\d", figure["env_id"])
        assert figure["algo"].islower()
        origins.add(tuple(figure[key] for key in ("algo", "env_id", "step", "source", "statistic")))
    assert len(origins) == len(figures)


def test_the_same_runs_make_the_same_bytes_and_copies_count_once(tmp_path):
    """A copy of a run is named. A run that is given twice is not."""
    write_run(tmp_path / "runs/a", points=[(0, 1.0), (10, 2.0)])
    lines = []
    for seed in range(1, 10):
        for step in (0, 10):
            row = {"algo": "sac", "env_id": "A-v0", "seed": seed, "step": step}
            lines.append(json.dumps(row | {"eval/return": step / 10 + seed**3}) + "\n")
    (tmp_path / "raw.jsonl").write_text("".join(lines))
    paths = (tmp_path / "runs", tmp_path / "runs/a", tmp_path / "raw.jsonl")
    page = make_page(tmp_path, *paths)
    assert page == make_page(tmp_path, *paths)
    text = visible_text(page)
    assert "9 runs of sac in A-v0" in text
    reason = f"its seed and evaluations are those of {tmp_path}/runs/a."
    assert f"raw.jsonl/A-v0__sac__1 : {reason}" in text
    assert text.count("Left out:") == 1


def test_raw_curves_show_their_commit_and_versions(tmp_path):
    row = {"algo": "sac", "env_id": "A-v0", "seed": 1, "commit": "0123456789abcdef"}
    row |= {"versions": {"torch": "2.13.0"}, "step": 0, "eval/return": 1.0}
    (tmp_path / "raw.jsonl").write_text(json.dumps(row) + "\n")
    text = visible_text(make_page(tmp_path, tmp_path / "raw.jsonl"))
    assert "torch 2.13.0 0123456789 " in text


def test_the_committed_page_shows_the_committed_curves(tmp_path, monkeypatch):
    """The compressed raw data are compared unpacked, because versions of zlib differ."""
    monkeypatch.chdir(ROOT / "results")
    curves = [Path(f"{name}.jsonl") for name in ("classic", "mujoco", "off_policy", "sac")]

    def unpack(match):
        return gzip.decompress(base64.b64decode(match[0])).decode()

    def with_unpacked_data(page):
        return re.sub('H4sI[^"]+', unpack, page)

    committed = Path("report.html").read_text()
    assert with_unpacked_data(make_page(tmp_path, *curves)) == with_unpacked_data(committed)


def test_long_curves_are_thinned(tmp_path):
    """A panel keeps about 200 evaluated steps, among them both ends of every line."""
    points = [(step, float(step)) for step in range(7, 1007)]
    write_run(tmp_path / "runs/a", algo="sac", points=points)
    write_run(tmp_path / "runs/b", algo="td3", points=[(step, 0.0) for step in (8, 500, 999)])
    page = make_page(tmp_path)
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    (panel,) = data["panels"]
    steps = [int(step.replace(",", "")) for step in panel["steps"]]
    assert steps[0] == 7
    assert steps[-1] == 1006
    assert {8, 999} <= set(steps)
    assert 200 <= len(steps) <= 202
    sac, td3 = (line["text"] for line in panel["lines"])
    assert sac == [report.format_number(step) for step in steps]
    assert td3 == ["0" if 8 <= step <= 999 else None for step in steps]


def test_runs_that_differ_in_a_flag_are_named(tmp_path):
    write_run(tmp_path / "runs/a", seed=1, points=[(0, 1.0)], lr=1e-3, run_dir="a")
    write_run(tmp_path / "runs/b", seed=1, points=[(0, 2.0)], lr=3e-4, run_dir="b")
    text = visible_text(make_page(tmp_path))
    assert "sac on A-v0: its runs differ in lr: 0.001 or 0.0003." in text
    assert "run_dir" not in text
    assert "A-v0 sac 2 runs of 1 seed 0 1.5 [1, 2]" in text


# Bad input


def test_damaged_runs_are_left_out_and_named(tmp_path, capsys):
    runs = tmp_path / "runs"
    points = [(0, 1.0), (10, 2.0)]
    for name in "config keys flags torn bare orphan number nan young type".split():
        write_run(runs / name, seed=9, points=() if name == "young" else points)
    write_run(runs / "good", points=points, tail='{"step": 20, "eval/re', finished=False)
    write_run(runs / "apart", env_id="B-v0", points=[(0, 1.0)])
    write_run(runs / "ahead", env_id="B-v0", seed=2, points=[(5, 1.0)])

    (runs / "config" / "config.json").write_text('{"algo": "sac", "args": {')
    (runs / "keys" / "config.json").write_text("{}")
    config = json.loads((runs / "flags" / "config.json").read_text())
    (runs / "flags" / "config.json").write_text(json.dumps(config | {"command": None}))
    config["args"]["env_id"] = ["A-v0"]
    (runs / "type" / "config.json").write_text(json.dumps(config))

    (runs / "torn" / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    (runs / "bare" / "metrics.jsonl").unlink()
    (runs / "orphan" / "config.json").unlink()
    (runs / "number" / "metrics.jsonl").write_text('{"step": 0, "eval/return": "high"}\n')
    (runs / "nan" / "metrics.jsonl").write_text('{"step": 0, "eval/return": NaN}\n')

    (tmp_path / "raw.jsonl").write_text('{"step": 0, "eval/return": 1}\n')
    row = {"algo": "td3", "env_id": "C-v0", "seed": 1, "step": 0}
    half_damaged = [row | {"eval/return": "low"}, row | {"seed": 2, "eval/return": 1.0}]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half_damaged))
    (tmp_path / "empty").mkdir()

    others = [tmp_path / name for name in ("raw.jsonl", "half.jsonl", "empty", "nonesuch")]
    text = visible_text(make_page(tmp_path, runs, *others))
    errors = capsys.readouterr().err
    reasons = {
        runs / "config": "config.json is not the config of a run",
        runs / "keys": "config.json is not the config of a run",
        runs / "flags": "its config.json or its rows are not what algos/ writes",
        runs / "type": "its config.json or its rows are not what algos/ writes",
        runs / "torn": "line 2 of ",
        runs / "bare": "it has no metrics.jsonl",
        runs / "orphan": "it has no config.json",
        runs / "number": "a step or eval/return in it is not a number",
        runs / "nan": "a step or eval/return in it is not finite",
        runs / "young": "it has no eval/return yet",
        runs / "apart": "the runs of sac on B-v0 share no step",
        runs / "ahead": "the runs of sac on B-v0 share no step",
        tmp_path / "raw.jsonl": "line 1 of ",
        tmp_path / "half.jsonl/C-v0__td3__1": "a step or eval/return in it is not a number",
        tmp_path / "empty": "it has no config.json",
        tmp_path / "nonesuch": "neither a folder nor a .jsonl file",
    }
    for path, reason in reasons.items():
        reason = re.escape(reason)
        assert re.search(rf"^left out: {path}: .*{reason}", errors, re.M), (path, errors)
        assert re.search(rf"Left out: {path} : [^:]*{reason}", text), (path, text)
    assert errors.count("left out") == len(reasons)
    assert text.count("Left out") == len(reasons)
    assert "2 runs of sac, td3 in A-v0, C-v0" in text
    assert "A-v0 sac 1 10 of 3,000, under way 60 download" in text


def test_a_folder_whose_name_is_not_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "run"
    write_run(folder, points=[(1000, 3.0), (3000, 5.0)])
    report.report(report.Args((tmp_path,), output=tmp_path / "report.html"))
    assert "caf?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run found: give folders"):
        make_page(tmp_path, tmp_path)
    command = [sys.executable, "scripts/report.py", "-o", str(tmp_path / "a.html")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: no run found")
    assert "Traceback" not in process.stderr


# The page in a browser


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium without a screen."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("needs chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit(NamedTuple):
    """An open page, and what goes wrong on it."""

    page: object
    problems: list  # console messages, errors, and requests for anything but the page's file


def visit(chromium, path, **context):
    """Open the page of a file."""
    page = chromium.new_page(**context)
    problems = []

    def add_foreign_request(request):
        if request.url != path.as_uri():
            problems.append(request.url)

    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", add_foreign_request)
    page.goto(path.as_uri())
    return Visit(page, problems)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with two lines of two seeds and a line of one point.

    The label of one line would run a script if the page did not escape it.
    """
    tmp_path = tmp_path_factory.mktemp("report")
    for seed in (1, 2):
        points = [(step, 1.1 * seed * step) for step in range(0, 3001, 1000)]
        write_run(tmp_path / f"runs/sac-{seed}", "A-v0", "sac", seed, points)
        points = [(step, -0.1 * step) for step in (1000, 2000)]
        write_run(tmp_path / f"runs/bad-{seed}", "A-v0", HOSTILE_LABEL, seed, points, tail='{"st')
    write_run(tmp_path / "runs/one", "B-v0", "sac", 1, [(0, 5.0)])
    make_page(tmp_path)
    return tmp_path / "report.html"


@pytest.mark.slow
def test_mouse_and_arrow_keys_show_the_values_of_every_line(chromium, page_file):
    page, problems = visit(chromium, page_file, viewport={"width": 1200, "height": 900})
    plot = page.locator(".plot").first
    figure = page.locator("figure").first
    bubble = page.locator(".guide span").first
    values_at_end = ["sac 2 seeds 4950 [3300, 6600]", f"{HOSTILE_LABEL} 2 seeds -200 [-200, -200]"]

    def shown():
        rows = [" ".join(row.split()) for row in figure.locator("tbody tr").all_inner_texts()]
        return sorted(rows, reverse=True), figure.locator(".at").inner_text()

    assert shown() == (values_at_end, "at its end")
    assert page.locator(".line [data-dot]").count() == 1  # a single point is drawn as a dot
    box = plot.bounding_box()

    def point_at(x, y):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])

    point_at(0.34, 0.5)  # nearest to step 1000, where SAC has 1100 and 2200
    values = ["sac 2 seeds 1650 [1100, 2200]", f"{HOSTILE_LABEL} 2 seeds -100 [-100, -100]"]
    assert shown() == (values, "at step 1,000")
    assert bubble.inner_text() == "sac 1650 [1100, 2200]"
    point_at(0.34, 1.0)
    assert bubble.inner_text() == f"{HOSTILE_LABEL} -100 [-100, -100]"
    point_at(0.99, 0.5)
    assert shown() == ([values_at_end[0], f"{HOSTILE_LABEL} 2 seeds –"], "at step 3,000")
    page.mouse.move(5, 5)
    assert shown() == (values_at_end, "at its end")
    plot.press("ArrowLeft")
    plot.press("ArrowLeft")
    values = ["sac 2 seeds 3300 [2200, 4400]", f"{HOSTILE_LABEL} 2 seeds -200 [-200, -200]"]
    assert shown() == (values, "at step 2,000")
    assert problems == []


@pytest.mark.slow
def test_raw_data_downloads_byte_for_byte(chromium, page_file, tmp_path):
    page, problems = visit(chromium, page_file)
    page.click("summary")
    rows = page.locator("section").last.locator("tbody tr")
    assert rows.count() == 5
    for row in rows.all():
        with page.expect_download() as download:
            row.locator("button").click()
        download.value.save_as(tmp_path / "raw")
        folder = page_file.parent / "runs" / row.locator("td").nth(-2).inner_text()
        assert (tmp_path / "raw").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "background"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")]
)
def test_the_page_fits_a_phone_and_follows_the_color_scheme(
    chromium, page_file, scheme, background
):
    page, problems = visit(
        chromium,
        page_file,
        viewport={"width": 360, "height": 740},
        color_scheme=scheme,
        has_touch=True,
    )
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
    plot = page.locator(".plot").first
    plot.tap(position={"x": 0.66 * plot.bounding_box()["width"], "y": 100})
    # The values stay after the finger leaves.
    assert page.locator(".at").first.inner_text() == "at step 2,000"
    assert problems == []


def random_row(k, values, rng):
    """Row k of a run like those of SAC on HalfCheetah, with more evaluations."""
    if k % 11 == 10:
        mean_return = rng.normal(2000, 900)
        metrics = {
            "eval/return": mean_return,
            "eval/return_std": rng.normal(90, 9),
            "eval/length": 1000.0,
            "eval/best": mean_return,
        }
    elif k % 2:
        metrics = {f"loss/{name}": value for name, value in zip("abcdef", values, strict=False)}
        metrics |= {"policy/std": values[6], "speed/sps": rng.normal(60, 1)}
    else:
        metrics = {"episode/return": rng.normal(2000, 900), "episode/length": 1000.0}
    wall = round(k * 10.1234 + values[6] / 100, 3)
    return {"step": 1000 * (k // 2 + 1), "wall": wall} | metrics


@pytest.mark.slow
def test_a_hundred_runs_of_a_thousand_rows(chromium, tmp_path):
    """They take less than 10 seconds of CPU time and a page of 2 to 5 MB."""
    rng = np.random.default_rng(0)
    for i in range(100):
        algo = ("sac", "td3")[i // 5 % 2]
        folder = tmp_path / f"runs/{i:03}"
        write_run(folder, f"E{i % 5}-v0", algo, seed=i // 10)
        values = rng.normal(100, 50, (1000, 7)).astype(np.float32).astype(float).tolist()
        rows = [random_row(k, values[k], rng) for k in range(1000)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = tmp_path / "report.html"
    command = [sys.executable, "scripts/report.py", str(tmp_path / "runs"), "-o", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 10
    assert 2e6 < output.stat().st_size < 5e6
    page, problems = visit(chromium, output)
    assert page.locator("figure").count() == 5
    assert problems == []

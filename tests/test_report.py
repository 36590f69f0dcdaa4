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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load

report = load(ROOT / "scripts" / "report.py")
LABEL = "</script><script>alert(1)</script>"


def write_run(folder, env_id="A-v0", algo="sac", seed=1, points=(), done=True, tail="", **flags):
    """A run folder with eval/return at the given (step, value), its other rows as algos/ writes them."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": algo, "seed": seed, "total_timesteps": 3000, **flags}
    versions = {"python": "3.11.7", "torch": "2.13.0", "mujoco": None}
    command = ["algos/a.py", "--seed", str(seed), "--x", "a b"]
    config = {"algo": algo, "args": args, "command": command, "commit": "0123456789abcdef", "versions": versions}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step, value in points:
        loss = float(np.float32(value / 3))
        rows.append({"step": step, "wall": step / 7, "episode/return": value / 7, "episode/length": 7.0})
        rows.append({"step": step, "wall": step / 7, "loss/a": loss, "loss/b": -0.0, "loss/c": 1e-7, "speed/sps": 60.5})
        rows.append({"step": step, "wall": step / 7, "eval/return": value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if done:
        (folder / "result.json").write_text("{}")


def make(tmp_path, *paths, **flags):
    """The page that is made."""
    report.main(report.Args(paths or (tmp_path / "runs",), output=tmp_path / "report.html", **flags))
    return (tmp_path / "report.html").read_text()


def text(page):
    """What is read on a page."""
    body = page.split("<script")[0].split("</style>")[-1]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


# ---- statistics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 11])
def test_iqm_is_scipys(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(size=(3, n))
    assert np.allclose(report.iqm(values), stats.trim_mean(values, 0.25, axis=-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "iqm"])
def test_bootstrap_of_one_stratum_is_scipys(name):
    """Within what the ends of two intervals of 2000 draws differ by chance: a standard error is 3 to 4 % of a width."""
    stats = pytest.importorskip("scipy.stats")
    values, estimate = np.random.default_rng(1).gumbel(size=12), getattr(report, name)
    theirs = np.mean, lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)
    theirs = stats.bootstrap((values,), theirs[name == "iqm"], n_resamples=50_000, method="percentile", rng=0)
    low, high = theirs.confidence_interval
    ours = report.bootstrap([values], lambda drawn: estimate(drawn[0]))
    assert ours == pytest.approx((low, high), abs=0.08 * (high - low))


def test_bootstrap_of_two_strata_draws_within_each():
    """Against a slow loop; drawn from both together, the interval would be three times as wide."""
    rng = np.random.default_rng(2)
    strata = [rng.normal(0, 1, 6), rng.normal(10, 1, 9)]
    slow = []
    for _ in range(10_000):
        drawn = [value for runs in strata for value in rng.choice(runs, len(runs))]
        slow.append(np.mean(sorted(drawn)[len(drawn) // 4 : len(drawn) - len(drawn) // 4]))
    low, high = np.quantile(slow, (0.025, 0.975))
    assert report.bootstrap(strata, report.pooled_iqm) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_improvement_is_mann_whitneys():
    """With ties, averaged over two environments."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    x, y = ([rng.integers(0, 5, n).astype(float) for n in sizes] for sizes in ((4, 7), (5, 3)))
    want = np.mean([stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y)])
    assert report.improvement(x + y) == pytest.approx(want, abs=1e-12)
    assert report.improvement(y + x) == pytest.approx(1 - want, abs=1e-12)


# ---- figures on the page ---------------------------------------------------------------------------------------------
def test_figures(tmp_path, capsys):
    """Curves, ends, published figures and comparisons, by hand."""
    for seed, end in ((1, 4000.0), (2, 6000.0), (3, 8000.0), (4, 9000.0)):
        write_run(tmp_path / f"runs/sac-{seed}", "Hopper-v4", "sac", seed, [(0, 0.0), (50_000, 0.0), (200_000, end)])
    for seed in (1, 2):
        write_run(tmp_path / f"runs/td3-{seed}", "Hopper-v4", "td3", seed, [(0, 0.0), (100_000, 1500.0 * seed)])
        write_run(tmp_path / f"runs/other-{seed}", "Hopper-v5", "td3", seed, [(0, 0.0), (250_000, 1.0)], done=seed > 1)
    page = make(tmp_path)
    read = text(page)
    assert "8 runs of td3, sac in Hopper-v5, Hopper-v4" in read
    assert re.search(r"Hopper-v4 sac 4 seeds 200,000 6750 \[\d+, \d+\] 6750 60 ", read)
    assert "Hopper-v5 td3 2 seeds, 1 under way 250,000 1 [1, 1] 1 60 " in read
    # Ours at the published steps, 100k and 200k; the other version is named, and a line which ends before says so.
    assert re.search(
        r"Hopper-v4 sac 100,000 2250 \[\d+, \d+\] 1103 10 mean, deterministic evaluation SBX, raw curves", read
    )
    assert re.search(
        r"Hopper-v4 sac 200,000 6750 \[\d+, \d+\] 2342 10 mean, deterministic evaluation SBX, raw curves", read
    )
    assert "Hopper-v5 td3 250,000 1 [1, 1] 2031 Hopper-v1 10 mean, deterministic evaluation TD3's authors" in read
    assert "Hopper-v4 td3 250,000 ends at 100,000 2031 Hopper-v1 10 mean, deterministic evaluation TD3's" in read
    # At 100k SAC has 1333, 2000, 2667, 3000, and TD3 1500, 3000: P(TD3 > SAC) = 4.5 / 8.
    assert "Hopper-v4 at 100,000 (0 to 2250)" in read and "Hopper-v5 at" not in read
    assert re.search(r"td3 sac 0.5625 \[[\d.]+, [\d.]+\] Hopper-v4 at 100,000", read)
    assert re.search(r"sac 1.037 \[[\d.]+, [\d.]+\] 4 Hopper-v4", read)
    assert f"python 3.11.7, torch 2.13.0 0123456789 {tmp_path}/runs/td3-2 python algos/a.py --seed 2 --x 'a b' " in read
    assert re.search(r"Hopper-v4 sac 4 seeds 200,000 7000 \[", text(make(tmp_path, est="iqm")))
    assert capsys.readouterr().err == ""


def test_published_figures_name_their_source():
    rows = json.loads(report.PUBLISHED.read_bytes())
    keys = {"algo", "env_id", "step", "value", "seeds", "statistic", "source"}
    assert all(keys <= row.keys() <= keys | {"spread"} for row in rows) and len(rows) > 100
    told = [(row["algo"], row["env_id"], row["step"], row["source"], row["statistic"]) for row in rows]
    assert len(set(told)) == len(told)
    assert all(re.fullmatch(r"\w+-v\d", row["env_id"]) and row["algo"].islower() for row in rows)


def test_same_bytes_and_raw_curves(tmp_path):
    """The page depends on nothing but the runs; a copy of a run, and a run given twice, count once."""
    write_run(tmp_path / "runs/a", points=[(0, 1.0), (10, 2.0)])
    rows = [
        {"algo": "sac", "env_id": "A-v0", "seed": seed, "step": x, "eval/return": x / 10 + seed**3}
        for seed in range(1, 10)
        for x in (0, 10)
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = tmp_path / "runs", tmp_path / "runs/a", tmp_path / "raw.jsonl"
    page = make(tmp_path, *paths)
    assert page == make(tmp_path, *paths)
    assert "9 runs of sac in A-v0" in text(page)
    assert f"raw.jsonl/A-v0__sac__1 : its seed and evaluations are those of {tmp_path}/runs/a." in text(page)
    assert text(page).count("Left out:") == 1


def test_the_committed_page_is_of_the_committed_curves(tmp_path, monkeypatch):
    """But for how the raw data are compressed, which is not the same with every zlib."""
    monkeypatch.chdir(ROOT / "results")
    curves = [Path(f"{name}.jsonl") for name in ("classic", "mujoco", "off_policy", "sac")]
    plain = partial(re.sub, 'H4sI[^"]+', lambda packed: gzip.decompress(base64.b64decode(packed[0])).decode())
    assert plain(make(tmp_path, *curves)) == plain(Path("report.html").read_text())


def test_long_curves_are_thinned(tmp_path):
    """To steps that were evaluated, the first and the last among them; what a line ends with is always shown."""
    write_run(tmp_path / "runs/a", algo="sac", points=[(x, float(x)) for x in range(7, 1007)])
    write_run(tmp_path / "runs/b", algo="td3", points=[(x, 0.0) for x in (8, 500, 999)])
    data = json.loads(make(tmp_path).split('type="application/json">')[1].split("</script>")[0])
    (panel,) = data["panels"]
    steps = [int(step.replace(",", "")) for step in panel["steps"]]
    assert steps[0] == 7 and steps[-1] == 1006 and {8, 999} <= set(steps) and 200 <= len(steps) <= 202
    sac, td3 = (line["text"] for line in panel["lines"])
    assert sac == [report.brief(step) for step in steps]
    assert td3 == ["0" if 8 <= step <= 999 else None for step in steps]


def test_runs_that_are_no_repetitions(tmp_path):
    write_run(tmp_path / "runs/a", seed=1, points=[(0, 1.0)], lr=1e-3, run_dir="a")
    write_run(tmp_path / "runs/b", seed=1, points=[(0, 2.0)], lr=3e-4, run_dir="b")
    read = text(make(tmp_path))
    assert "sac on A-v0: its runs differ in lr: 0.001 or 0.0003." in read and "run_dir" not in read
    assert "A-v0 sac 2 runs of 1 seed 0 1.5 [1, 2]" in read


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_what_is_broken_is_left_out_and_named(tmp_path, capsys):
    runs, good = tmp_path / "runs", [(0, 1.0), (10, 2.0)]
    for name in "config keys flags torn bare orphan number nan young type".split():
        write_run(runs / name, seed=9, points=() if name == "young" else good)
    write_run(runs / "good", points=good, tail='{"step": 20, "eval/re', done=False)
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
    half = [row | {"eval/return": "low"}, row | {"seed": 2, "eval/return": 1.0}]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    (tmp_path / "empty").mkdir()
    read = text(make(tmp_path, runs, *(tmp_path / name for name in ("raw.jsonl", "half.jsonl", "empty", "nonesuch"))))
    err = capsys.readouterr().err
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
        assert re.search(rf"^left out: {path}: .*{re.escape(reason)}", err, re.M), (path, err)
        assert re.search(rf"Left out: {path} : [^:]*{re.escape(reason)}", read), (path, read)
    assert err.count("left out") == read.count("Left out") == len(reasons)
    assert "2 runs of sac, td3 in A-v0, C-v0" in read and "A-v0 sac 1 10 of 3,000, under way 60 download" in read


def test_a_folder_whose_name_is_no_text(tmp_path):
    write_run(tmp_path / os.fsdecode(b"caf\xe9") / "run", points=[(1000, 3.0), (3000, 5.0)])
    report.main(report.Args((tmp_path,), output=tmp_path / "report.html"))
    assert "caf?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="error: no run there: give folders"):
        make(tmp_path, tmp_path)
    args = [sys.executable, "scripts/report.py", "-o", str(tmp_path / "a.html")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no run there") and "Traceback" not in done.stderr


# ---- the browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chromium():
    """Debian's chromium, without a screen."""
    api, path = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not path:
        pytest.skip("chromium is not there: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(chromium, path, **context):
    """A page with all that went wrong on it: errors, and requests for anything but its file."""
    page, wrong = chromium.new_page(**context), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url != path.as_uri() and wrong.append(request.url))
    page.goto(path.as_uri())
    return SimpleNamespace(page=page, wrong=wrong)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page of two lines of two seeds, one line named to break out of it, and a line of a single point."""
    tmp_path = tmp_path_factory.mktemp("report")
    for seed in (1, 2):
        write_run(
            tmp_path / f"runs/sac-{seed}", "A-v0", "sac", seed, [(x, 1.1 * seed * x) for x in range(0, 3001, 1000)]
        )
        write_run(
            tmp_path / f"runs/bad-{seed}", "A-v0", LABEL, seed, [(x, -0.1 * x) for x in (1000, 2000)], tail='{"st'
        )
    write_run(tmp_path / "runs/one", "B-v0", "sac", 1, [(0, 5.0)])
    make(tmp_path)
    return tmp_path / "report.html"


@pytest.mark.slow
def test_hovering_tells_values(chromium, page_file):
    """With the mouse and the keys: of each line, and of the one that is pointed at."""
    visited = visit(chromium, page_file, viewport={"width": 1200, "height": 900})
    page, plot = visited.page, visited.page.locator(".plot").first
    values = page.locator("figure").first.locator("tbody tr")
    at_end = ["sac 2 seeds 4950 [3300, 6600]", f"{LABEL} 2 seeds -200 [-200, -200]"]

    def shown():
        rows = [" ".join(row.split()) for row in values.all_inner_texts()]
        return sorted(rows, reverse=True), page.locator("figure").first.locator(".at").inner_text()

    assert shown() == (at_end, "at its end")
    assert page.locator(".line [data-dot]").count() == 1  # a single point is drawn as one
    box = plot.bounding_box()

    def point(x, y):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])

    point(0.34, 0.5)  # near a third: step 1000, where SAC has 1100 and 2200
    assert shown() == (["sac 2 seeds 1650 [1100, 2200]", f"{LABEL} 2 seeds -100 [-100, -100]"], "at step 1,000")
    assert page.locator(".guide span").first.inner_text() == "sac 1650 [1100, 2200]"
    point(0.34, 1.0)
    assert page.locator(".guide span").first.inner_text() == f"{LABEL} -100 [-100, -100]"
    point(0.99, 0.5)
    assert shown() == ([at_end[0], f"{LABEL} 2 seeds –"], "at step 3,000")
    page.mouse.move(5, 5)
    assert shown() == (at_end, "at its end")
    plot.press("ArrowLeft")
    plot.press("ArrowLeft")
    assert shown() == (["sac 2 seeds 3300 [2200, 4400]", f"{LABEL} 2 seeds -200 [-200, -200]"], "at step 2,000")
    assert visited.wrong == []


@pytest.mark.slow
def test_raw_data_downloads_to_the_last_byte(chromium, page_file, tmp_path):
    visited = visit(chromium, page_file)
    visited.page.click("summary")
    rows = visited.page.locator("section").last.locator("tbody tr")
    assert rows.count() == 5
    for row in rows.all():
        with visited.page.expect_download() as download:
            row.locator("button").click()
        download.value.save_as(tmp_path / "raw")
        folder = row.locator("td").nth(-2).inner_text()
        assert (tmp_path / "raw").read_bytes() == (page_file.parent / "runs" / folder / "metrics.jsonl").read_bytes()
    assert visited.wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_schemes(chromium, page_file, scheme):
    visited = visit(chromium, page_file, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = visited.page
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    plot = page.locator(".plot").first
    plot.tap(position={"x": 0.66 * plot.bounding_box()["width"], "y": 100})
    assert page.locator(".at").first.inner_text() == "at step 2,000"  # and so it stays, after the finger is gone
    assert visited.wrong == []


@pytest.mark.slow
def test_a_hundred_runs_of_a_thousand_rows(chromium, tmp_path):
    """As SAC on HalfCheetah writes them, with as many evaluations, which take the most room; and eval rows alone."""
    rng = np.random.default_rng(0)
    for i in range(100):
        env_id, algo, seed = f"E{i % 5}-v0", ("sac", "td3")[i // 5 % 2], i // 10
        write_run(tmp_path / f"runs/{i:03}", env_id, algo, seed)
        losses = rng.normal(100, 50, (1000, 7)).astype(np.float32).astype(float).tolist()
        rows = []
        for k, (*loss, value) in enumerate(losses):
            row = {"step": 1000 * (k // 2 + 1), "wall": round(k * 10.1234 + value / 100, 3)}
            more = {"episode/return": rng.normal(2000, 900), "episode/length": 1000.0}
            if k % 11 == 10:
                more = {
                    "eval/return": rng.normal(2000, 900),
                    "eval/return_std": rng.normal(90, 9),
                    "eval/length": 1000.0,
                }
                more["eval/best"] = more["eval/return"]
            elif k % 2:
                more = {f"loss/{name}": x for name, x in zip("abcdef", loss)}
                more |= {"policy/std": value, "speed/sps": rng.normal(60, 1)}
            rows.append(json.dumps(row | more) + "\n")
        (tmp_path / f"runs/{i:03}/metrics.jsonl").write_text("".join(rows))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = tmp_path / "report.html"
    args = [sys.executable, "scripts/report.py", str(tmp_path / "runs"), "-o", str(output)]
    subprocess.run(args, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10  # seconds
    assert 2e6 < output.stat().st_size < 5e6
    visited = visit(chromium, output)
    assert visited.page.locator("figure").count() == 5 and visited.wrong == []

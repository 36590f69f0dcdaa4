"""scripts/: watch, plot and blocks, on real runs and on files made by hand."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 300 --buffer-size 400 --hidden 16 16"
TINY += " --batch-size 16 --device cpu --threads 1 --eval-every 200 --eval-episodes 2 --checkpoint-every 200"


def script(name):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


watch, plot, blocks = script("watch"), script("plot"), script("blocks")


def command(*args, **env):
    """Run a script as its user does."""
    args = [sys.executable, *map(str, args)]
    return subprocess.run(args, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with a run of each of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    running = []
    for seed in ("1", "2"):
        run_dir = folder / "pendulum" / f"seed-{seed}"
        args = [sys.executable, "algos/sac.py", *TINY.split(), "--seed", seed, "--run-dir", str(run_dir)]
        running.append(subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    return folder


@pytest.fixture
def no_display(monkeypatch):
    """As on a server."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))  # so that what watch sets is taken back


# ---- watch -----------------------------------------------------------------------------------------------------------
def frames(path):
    """How many frames a video has, its seconds, and whether a later frame differs from the first."""
    import imageio_ffmpeg

    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    pictures = [np.frombuffer(frame, np.uint8) for frame in reader]
    reader.close()
    return count, seconds, size, any((picture != pictures[0]).any() for picture in pictures[1:])


def played(text):
    """The (return, length) of each episode that was printed, and the mean and std of the last line."""
    episodes = [(float(r), int(n)) for r, n in re.findall(r"^episode \d+: return (\S+), length (\d+)$", text, re.M)]
    numbers = re.search(r"^mean \+- std: return (\S+) \+- (\S+), length (\S+) \+- (\S+)$", text, re.M).groups()
    return episodes, [float(number) for number in numbers]


@pytest.mark.parametrize("name", ["watch", "plot", "blocks", "report", "speed", "sweep", "export"])
def test_help_says_what_every_flag_is_for(name):
    """Every field of Args has its comment on its own line, where the help text is taken from."""
    text = (ROOT / "scripts" / f"{name}.py").read_text()
    body = text[text.index("class Args:") :].split("\n\n\n")[0]
    flags = [line for line in body.splitlines() if re.match(r"    \w+: ", line)]
    assert flags and all("  # " in line for line in flags), flags


def test_watch_prints_and_films(runs, no_display):
    """The command: each return, mean and std, and by default an mp4 of every state."""
    pytest.importorskip("pygame")
    run_dir = runs / "pendulum" / "seed-1"
    done = command("scripts/watch.py", run_dir, "--episodes", 2, "--max-steps", 40)
    assert done.returncode == 0, done.stderr
    episodes, (mean, std, length, spread) = played(done.stdout)
    returns = [r for r, _ in episodes]
    assert [n for _, n in episodes] == [40, 40] and (length, spread) == (40, 0)
    assert mean == pytest.approx(np.mean(returns), abs=0.011) and std == pytest.approx(np.std(returns), abs=0.011)
    assert returns[0] != returns[1]
    video = run_dir / "videos" / "watch.mp4"
    assert done.stdout.splitlines()[-1] == str(video)
    count, seconds, size, moves = frames(video)
    assert count == 2 * 41 and moves and size == (500, 500)
    assert seconds == pytest.approx(82 / 30, abs=0.1)  # as fast as the environment says that it is
    assert "DeprecationWarning" not in done.stderr


def test_watch_gif(runs, tmp_path, no_display, capsys):
    pytest.importorskip("pygame")
    output = tmp_path / "deep" / "a.gif"
    args = watch.Args(runs / "pendulum" / "seed-1", episodes=2, max_steps=15, output=output)
    episodes = watch.main(args)
    assert played(capsys.readouterr().out)[0] == [(round(r, 2), n) for r, n in episodes]
    assert [n for _, n in episodes] == [15, 15]
    count, seconds, size, moves = frames(output)
    assert output.read_bytes()[:3] == b"GIF"
    assert count == 2 * 16 and moves and size == (500, 500) and seconds == pytest.approx(32 / 30, abs=0.05)


@pytest.mark.parametrize(("ending", "size", "count"), [("mp4", (52, 42), 50), ("gif", (51, 41), 20)])
def test_videos_of_odd_size_and_125_frames_a_second(tmp_path, ending, size, count):
    """h264 takes even sizes alone, and a gif no more than 50 frames a second."""
    pictures = np.random.default_rng(0).integers(0, 255, (50, 41, 51, 3), dtype=np.uint8)
    video = watch.open_video(tmp_path / f"a.{ending}", pictures[0], 125)
    for picture in pictures:
        video.send(picture)
    video.close()
    found, seconds, found_size, moves = frames(tmp_path / f"a.{ending}")
    assert (found, found_size, moves) == (count, size, True) and seconds == pytest.approx(50 / 125, abs=0.03)


def test_watch_in_a_window(runs, no_display, monkeypatch):
    """With a display a window is the default, and leaves no file; --output asks for a video."""
    pytest.importorskip("pygame")
    run_dir = runs / "pendulum" / "seed-2"
    args = watch.Args(run_dir, episodes=1, max_steps=3)
    with pytest.raises(SystemExit, match="no display: take --render video"):
        watch.main(watch.Args(run_dir, render="window"))
    monkeypatch.setenv("DISPLAY", ":0")  # pygame's own driver draws into nothing all the same
    assert watch.main(args)[0][1] == 3
    assert not (run_dir / "videos").exists()


def test_watch_deterministic_or_sampled(runs, no_display):
    """Both are reproducible by --seed; sampling changes the actions, not where the episodes start."""
    run_dir = runs / "pendulum" / "seed-1"

    def play(**flags):
        return watch.main(watch.Args(run_dir, render="none", max_steps=100, **flags))

    best, sampled = play(episodes=2), play(episodes=2, sample=True)
    assert best == play(episodes=2) and sampled == play(episodes=2, sample=True)
    assert best[0] == play(episodes=1)[0]  # whatever follows
    assert best != sampled and best != play(episodes=2, seed=1)
    assert sampled != play(episodes=2, sample=True, seed=1)
    first = [watch.main(watch.Args(run_dir, render="none", max_steps=1, episodes=1, sample=s)) for s in (False, True)]
    assert first[0][0][0] == pytest.approx(first[1][0][0], abs=0.01)  # a step costs angle^2, and .001 action^2


def test_watch_plays_the_policy_of_the_run(runs, no_display):
    """Its returns are those of load_policy() in a plain loop."""
    import gymnasium as gym

    run_dir = runs / "pendulum" / "seed-1"
    played_by_watch = watch.main(watch.Args(run_dir, episodes=1, render="none", seed=3))
    spec = importlib.util.spec_from_file_location("sac_of_the_test", ROOT / "algos" / "sac.py")
    sac = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sac)
    policy, env = sac.load_policy(run_dir), gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=np.random.SeedSequence(3).generate_state(1).tolist()[0])
    total, done, length = 0.0, False, 0
    while not done:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, done, length = total + reward, terminated or truncated, length + 1
    assert played_by_watch == [(pytest.approx(total, rel=1e-12), length)]


DISCRETE = """
import gymnasium as gym, numpy as np

class Count(gym.Env):
    '''Ends as action 1 is taken; gives 1 for it and 10 for a plain int.'''
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    def __init__(self, render_mode=None):
        self.render_mode = render_mode
    def render(self):
        return None
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.zeros(1, np.float32), 10.0 * (type(action) is int) + action, bool(action), False, {}

gym.register("Count-v0", Count)
"""
ALWAYS_1 = """
import numpy as np
def load_policy(run_dir, deterministic=True):
    return lambda obs: np.ones(obs.shape[:-1], np.int64)
"""


@pytest.fixture
def count(tmp_path, monkeypatch):
    """A run of an algorithm of its own, in an environment of the current folder that takes 0 or 1 and draws nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(watch, "ALGOS", tmp_path / "algos")
    (tmp_path / "count_env.py").write_text(DISCRETE)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "always.py").write_text(ALWAYS_1)
    (tmp_path / "run").mkdir()
    config = {"algo": "always", "args": {"env_id": "count_env:Count-v0"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "policy.pt").touch()
    return tmp_path / "run"


def test_watch_discrete_actions_and_own_environments(count, no_display):
    assert watch.main(watch.Args(count, episodes=2, render="none")) == [(11.0, 1), (11.0, 1)]
    with pytest.raises(SystemExit, match="error: cannot draw count_env:Count-v0: it gives no picture.*--render none"):
        watch.main(watch.Args(count, render="video"))


def test_watch_bounds_in_float64_and_rewards_in_arrays():
    env = watch.make_env("probes:probe/Precise-v0", None)
    total, length = watch.play(env, lambda obs: np.array([0.1], np.float32), 0, 10, lambda: None)
    assert total == pytest.approx(-0.05) and length == 5


def test_watch_errors(runs, count, tmp_path, no_display):
    empty, run_dir = tmp_path / "empty", runs / "pendulum" / "seed-1"
    empty.mkdir()

    def error(match, run_dir=run_dir, **flags):
        with pytest.raises(SystemExit, match=match):
            watch.main(watch.Args(run_dir, **{"render": "none"} | flags))

    error("^error: .*empty is no run: give the folder in which a run's config.json lies$", empty)
    for text in ("{", "[]", "{}", '{"algo": "sac", "args": {}}'):
        (empty / "config.json").write_text(text)
        error("is no run", empty)
    (empty / "config.json").write_text('{"algo": "nonesuch", "args": {"env_id": "Nonesuch-v0"}}')
    error("no policy.pt yet: the first checkpoint", empty)
    (empty / "policy.pt").write_bytes(b"torn")
    error("nonesuch.*put nonesuch.py there", empty)
    (empty / "config.json").write_text('{"algo": "always", "args": {"env_id": "Nonesuch-v0"}}')
    error("cannot make Nonesuch-v0", empty)
    error("--episodes must be", episodes=0)
    error("--max-steps", max_steps=-1)
    error("must end in .mp4 or .gif", output=Path("a.avi"))
    error("--render none makes no video: take --render video", output=Path("a.mp4"), render="none")


def test_watch_a_damaged_policy(runs, tmp_path, no_display):
    shutil.copytree(runs / "pendulum" / "seed-1", tmp_path / "run")
    (tmp_path / "run" / "policy.pt").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="sac.py cannot read .*policy.pt: "):
        watch.main(watch.Args(tmp_path / "run", render="none"))


# ---- plot ------------------------------------------------------------------------------------------------------------
def write_run(folder, env_id="A-v0", algo="sac", seed=1, points=(), exp_name=None, tail=""):
    """A run folder with eval/return at the given (step, value)."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": exp_name or algo, "seed": seed}
    (folder / "config.json").write_text(json.dumps({"algo": algo, "args": args}))
    rows = [{"step": x, "wall": x / 10, "eval/return": y} for x, y in points]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def picture(path):
    """The pixels of a PNG [H, W, 3], 0 to 1."""
    return plot.plt.imread(path)[..., :3]


def has(pixels, color):
    """How many pixels have just this colour."""
    want = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(pixels - want) < 0.004).all(-1).sum())


def draw(tmp_path, *paths, **flags):
    """What plot drew."""
    plot.main(plot.Args(paths, output=tmp_path / "figures" / "a.png", **flags))
    return picture(tmp_path / "figures" / "a.png")


def test_plot_real_runs(runs, tmp_path):
    """The command, given the folder above: both seeds in one line, with a band, and the table."""
    output = tmp_path / "figures" / "curves.png"
    done = command("scripts/plot.py", runs, "--output", output)
    assert done.returncode == 0 and done.stderr == ""
    rows = [json.loads(line) for path in runs.rglob("metrics.jsonl") for line in path.open()]
    final = [row["eval/return"] for row in rows if row["step"] == 400 and "eval/return" in row]
    assert len(final) == 2
    half = 12.7062 * np.std(final, ddof=1) / math.sqrt(2)
    head, line, last = done.stdout.splitlines()
    assert head.split() == ["environment", "line", "runs", "until", "final", "highest"] and last == str(output)
    env_id, label, count, until, mean, sign, interval, _ = line.split()
    assert (env_id, label, count, until, sign) == ("Pendulum-v1", "sac", "2", "400", "+-")
    assert float(mean) == pytest.approx(np.mean(final), abs=0.51) and float(interval) == pytest.approx(half, rel=1e-3)
    pixels = picture(output)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 600
    assert has(pixels, plot.COLORS[0]) > 300 and has(pixels, plot.COLORS[1]) == 0


def test_smooth():
    y = np.array([1.0, 2.0, 6.0, 4.0, 0.0])
    assert plot.smooth(y, 1).tolist() == y.tolist()
    assert plot.smooth(y, 3).tolist() == [1.5, 3.0, 4.0, 10 / 3, 2.0]
    assert plot.smooth(y, 2).tolist() == [1.0, 1.5, 4.0, 5.0, 2.0]
    assert plot.smooth(y, 99).tolist() == [2.6] * 5
    assert plot.smooth(np.full(7, 3.0), 4).tolist() == [3.0] * 7  # the ends are not pulled to 0


def test_curve():
    """Rows without the metric are passed over, and those at one step averaged."""
    rows = [{"step": 20, "a": 4}, {"step": 10, "a": 1}, {"step": 20, "a": 8}, {"step": 30, "b": 9}, {"a": 7}]
    x, y = plot.curve(rows, "step", "a")
    assert x.tolist() == [10, 20] and y.tolist() == [1, 6]
    assert [part.tolist() for part in plot.curve(rows, "step", "c")] == [[], []]


def test_interpolate():
    """On all the steps of the runs, within the range that each of them covers: 10 to 30."""
    one = np.array([0.0, 10, 30]), np.array([0.0, 10, 50])
    two = np.array([10.0, 20, 40]), np.array([1.0, 3, 7])
    x, values = plot.interpolate([one, two])
    assert x.tolist() == [10, 20, 30]
    assert values.tolist() == [[10, 30, 50], [1, 3, 5]]
    apart = np.array([50.0]), np.array([0.0])
    assert plot.interpolate([one, apart])[0].tolist() == []


def test_interval():
    """Against the printed tables of Student's t."""
    for df, t in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (100, 1.98397)):
        assert plot.student(df) == pytest.approx(t, abs=1e-4)
    values = np.array([[1.0, 5], [2.0, 5], [3.0, 5]])
    assert plot.half_width(values, "std").tolist() == [1, 0]
    assert plot.half_width(values, "ci").tolist() == pytest.approx([4.30265 / math.sqrt(3), 0], abs=1e-4)
    assert plot.half_width(values[:1], "ci").tolist() == [0, 0]


def test_lines_never_pool_environments(tmp_path):
    """A line is an environment, an algorithm and an experiment. What is smoothed is the single run."""
    points = [(0, 0.0), (10, 3.0), (20, 9.0)]
    write_run(tmp_path / "a1", seed=1, points=points)
    write_run(tmp_path / "deep" / "er" / "a2", seed=2, points=points[:2])
    write_run(tmp_path / "b", env_id="B-v0", points=points)
    write_run(tmp_path / "td3", algo="td3", points=points)
    write_run(tmp_path / "wide", exp_name="wide", points=points)
    args = plot.Args((tmp_path, tmp_path / "b" / ".." / "a1"), smooth=3)  # a1 twice is a1 once
    lines = plot.collect(args)
    assert {env_id: {label: len(found) for label, found in by.items()} for env_id, by in lines.items()} == {
        "A-v0": {"sac": 2, "td3": 1, "sac wide": 1},
        "B-v0": {"sac": 1},
    }
    assert lines["B-v0"]["sac"][0][1].tolist() == [1.5, 4, 6]
    x, values = plot.align(lines, "step")["A-v0"]["sac"]
    assert x.tolist() == [0, 10] and values.tolist() == [[1.5, 4], [1.5, 1.5]]
    table = plot.tabulate(plot.align(lines, "step"), args, "steps")
    assert table[1] == ("A-v0", "sac", "2", "10", "2.75 +- 15.88", "2.75")  # 12.7062 * 1.25
    assert table[4] == ("B-v0", "sac", "1", "20", "6", "6")
    by_wall = plot.collect(plot.Args((tmp_path,), x="wall"))
    assert by_wall["B-v0"]["sac"][0][0].tolist() == [0, 1, 2]


def test_select_exclude_legend(tmp_path):
    points = [(0, 0.0), (10, 3.0)]
    for name in ("fast/x", "fast/y", "slow/x"):
        write_run(tmp_path / name, seed=len(name), exp_name=name[:4], points=points)

    def labels(*paths, **flags):
        return {label: len(found) for label, found in plot.collect(plot.Args(paths, **flags))["A-v0"].items()}

    assert labels(tmp_path) == {"sac fast": 2, "sac slow": 1}
    assert labels(tmp_path, select=("fast", "/x")) == {"sac fast": 1}
    assert labels(tmp_path, exclude=("fast/y", "slow")) == {"sac fast": 1}
    assert labels(tmp_path / "slow", tmp_path / "fast", legend=("one", "two")) == {"one": 1, "two": 2}
    with pytest.raises(SystemExit, match="--legend has 1 names for 2 paths"):
        labels(tmp_path / "slow", tmp_path / "fast", legend=("one",))
    with pytest.raises(SystemExit, match="no run there"):
        labels(tmp_path, select=("nonesuch",))


def test_plot_estimates_and_bands(tmp_path, capsys):
    """The line is where --est puts it: the rows of pixels tell. Only a mean has a band."""
    for seed, value in enumerate((0.0, 1.0, 8.0)):
        write_run(tmp_path / str(seed), seed=seed, points=[(0, value), (100, value)])
    lines = plot.align(plot.collect(plot.Args((tmp_path,))), "step")
    for est, level, bands in (("mean", 3, 1), ("median", 1, 0), ("max", 8, 0), ("min", 0, 0)):
        figure = plot.draw(lines, plot.Args((tmp_path,), est=est, count=True), "steps")
        (axis,) = figure.axes
        assert axis.get_lines()[0].get_ydata().tolist() == [level, level]
        assert len(axis.collections) == bands
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sac (3)"]
        assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("A-v0", "environment steps", "eval/return")
        plot.plt.close(figure)
    for band, half in (("std", 19**0.5), ("ci", 4.30265 * (19 / 3) ** 0.5)):
        figure = plot.draw(lines, plot.Args((tmp_path,), band=band), "steps")
        heights = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (pytest.approx(3 - half, 1e-4), pytest.approx(3 + half, 1e-4))
        plot.plt.close(figure)


def test_plot_panels(tmp_path, capsys):
    """A panel for each environment and one colour for a line in all of them; time in its unit."""
    for env_id in ("A-v0", "B-v0", "C-v0", "D-v0", "E-v0"):
        for algo in ("sac", "td3"):
            if (env_id, algo) != ("A-v0", "sac"):
                write_run(tmp_path / env_id / algo, env_id, algo, points=[(0, 1.0), (200_000, 2.0 + (algo == "td3"))])
    pixels = draw(tmp_path, tmp_path, x="wall")
    assert has(pixels, plot.COLORS[0]) > 300 and has(pixels, plot.COLORS[1]) > 300 and not has(pixels, plot.COLORS[2])
    assert "5.6 hours" in capsys.readouterr().out
    figure = plot.draw(plot.align(plot.collect(plot.Args((tmp_path,))), "step"), plot.Args((tmp_path,)), "steps")
    assert [axis.get_title() for axis in figure.axes] == ["A-v0", "B-v0", "C-v0", "D-v0", "E-v0"]
    colors = [[line.get_color() for line in axis.get_lines()] for axis in figure.axes]
    assert colors == [[plot.COLORS[0]]] + [[plot.COLORS[1], plot.COLORS[0]]] * 4  # td3 was found before sac
    plot.plt.close(figure)


def test_plot_torn_line_and_metric_not_there(tmp_path, capsys):
    """A torn last line is a run under way; one in the middle is damage."""
    write_run(tmp_path / "run", points=[(0, 1.0), (10, 2.0)], tail='{"step": 20, "eval/re')
    write_run(tmp_path / "young", seed=2, tail='{"step": 1, "wall": 0.1, "episode/return": 3.0}\n')
    assert has(draw(tmp_path, tmp_path), plot.COLORS[0]) > 300
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["A-v0", "sac", "1", "10", "2", "2"]
    assert err == f"warning: left out, without eval/return by step: {tmp_path / 'young'}\n"
    with pytest.raises(SystemExit, match="no run has loss/x by step: take --value from episode/return, eval/return$"):
        draw(tmp_path, tmp_path, value="loss/x")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(SystemExit, match="line 2 of .*metrics.jsonl is not JSON"):
        draw(tmp_path, tmp_path)


def test_plot_raw_curves(tmp_path, capsys):
    """A .jsonl file of results/: its runs are told apart by environment, algorithm and seed."""
    path = tmp_path / "raw.jsonl"
    points = [("A-v0", "sac", 1, 5), ("A-v0", "sac", 2, 7), ("A-v0", "td3", 1, 1), ("B-v0", "sac", 1, 9)]
    rows = [
        {"algo": algo, "env_id": env_id, "seed": seed, "step": step, "eval/return": value + step / 1e6}
        for step in (500_000, 1_000_000)
        for env_id, algo, seed, value in points
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pixels = draw(tmp_path, path)
    assert has(pixels, plot.COLORS[0]) > 300 and has(pixels, plot.COLORS[1]) > 300
    table = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert table == [
        ["A-v0", "sac", "2", "1M", "7 +- 12.71", "7"],
        ["A-v0", "td3", "1", "1M", "2", "2"],
        ["B-v0", "sac", "1", "1M", "10", "10"],
    ]
    assert list(plot.collect(plot.Args((path,), select=("B-v0__sac",)))) == ["B-v0"]
    with pytest.raises(SystemExit, match="no run has eval/return by wall: no row has a metric and a wall"):
        draw(tmp_path, path, x="wall")


def test_saved_curves_draw_the_same_figure(tmp_path, capsys):
    """--save writes what was read, unsmoothed, in the form that is read again."""
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed, points=[(0, 1.0), (10, 2.0 * seed), (20, 5.0)])
    drawn, raw = draw(tmp_path, tmp_path, smooth=3, save=tmp_path / "raw.jsonl"), tmp_path / "raw.jsonl"
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    made_by = {"algo": "sac", "env_id": "A-v0", "seed": 2, "code": None}  # at no commit that is known
    assert rows[4] == made_by | {"step": 10.0, "eval/return": 4.0} and len(rows) == 6
    assert (draw(tmp_path, raw, smooth=3) == drawn).all()


def test_a_file_of_another_make_has_no_fingerprint(tmp_path, monkeypatch):
    """One without the banners of the plumbing, or that is not Python, at the commit that its run was made at."""
    texts = {"plain": "import torch\n", "broken": "def (\n" + blocks.BEGIN.decode() + "\n" + blocks.END.decode() + "\n"}
    (tmp_path / "algos").mkdir()
    for algo, text in texts.items():
        (tmp_path / "algos" / f"{algo}.py").write_text(text)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(plot, "__file__", str(tmp_path / "algos" / "plot.py"))  # from where it asks git
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    for algo in texts:
        run = SimpleNamespace(config={"algo": algo, "commit": head}, rows=[])
        assert plot.code(run) is None


def test_plot_errors(tmp_path, capsys):
    def error(match, *paths, **flags):
        with pytest.raises(SystemExit, match=match):
            draw(tmp_path, *paths, **flags)

    error("give folders")
    error("neither a folder nor", tmp_path / "nonesuch")
    error("no run there", tmp_path)
    write_run(tmp_path / "one", points=[(0, 1.0), (10, 2.0)])
    error("lacks env_id, algo or seed.* give its folder", tmp_path / "one" / "metrics.jsonl")
    error("--smooth is 0", tmp_path, smooth=0)
    (tmp_path / "raw.jsonl").write_text('{"env_id": "A-v0", "algo": "sac", "seed": 1, "step": 1, "code": "a1"}\n')
    error("step or code is not a number in .*raw.jsonl", tmp_path / "raw.jsonl", value="code")
    with pytest.raises(SystemExit, match="must end in .png"):
        plot.main(plot.Args((tmp_path,), output=Path("a.xyz")))
    write_run(tmp_path / "two", points=[(20, 1.0)])
    capsys.readouterr()
    error("runs of sac on A-v0 share no step", tmp_path)
    assert "warning: sac on A-v0 has runs with the same seed" in capsys.readouterr().err
    error("--save would make one run of several: sac on A-v0", tmp_path, save=tmp_path / "saved.jsonl")
    assert not (tmp_path / "saved.jsonl").exists()
    (tmp_path / "two" / "config.json").write_text("{}")
    error("is not the config of a run", tmp_path)


# ---- blocks ----------------------------------------------------------------------------------------------------------
def check(root):
    """--check of a folder: its exit code and what it printed."""
    done = command("scripts/blocks.py", "--check", "--root", root)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


SMALL = b"""import os
%BEGIN
LIMIT = 3


# Why it is so.
@staticmethod
def one():
    return 1


class Two:
    x: int = 2


%END
print(os)
""".replace(b"%BEGIN", blocks.BEGIN).replace(b"%END", blocks.END)


def small(root, **files):
    """A folder of files."""
    for name, text in files.items():
        (root / f"{name}.py").write_bytes(text)


def test_blocks_of_this_repository():
    done = command("scripts/blocks.py", "--check")
    assert done.returncode == 0, done.stdout


def test_blocks_parse():
    lines, found, problems = blocks.parse(SMALL)
    texts = {name: b"".join(lines[first:last]) for name, (first, last) in found.items()}
    assert problems == [] and b"".join(lines) == SMALL
    assert texts == {
        "LIMIT": b"LIMIT = 3\n",
        "one": b"# Why it is so.\n@staticmethod\ndef one():\n    return 1\n",
        "Two": b"class Two:\n    x: int = 2\n",
    }


def test_blocks_one_byte(tmp_path):
    """In copies of the real files one byte is changed, told, and mended without a change elsewhere."""
    sac = (ROOT / "algos" / "sac.py").read_bytes()
    text = sac.replace(b"def load_policy", b"def load__policy")  # outside a name may mean another thing
    assert text != sac
    small(tmp_path, sac=sac, td3=text, ddpg=text.replace(b"an evaluation must end", b"an evaluation MUST end"))
    code, out = check(tmp_path)
    assert code == 1 and "make_env differs between\n  sac.py, td3.py\n  ddpg.py\n" in out
    assert "MUST end" in out and out.count("differs") == 1
    done = command("scripts/blocks.py", "--write", tmp_path / "sac.py", "--root", tmp_path)
    assert (
        done.stdout.startswith("ddpg.py: carried the blocks of sac.py over\n") and "td3.py: carried" not in done.stdout
    )
    assert [(tmp_path / f"{name}.py").read_bytes() for name in ("sac", "td3", "ddpg")] == [sac, text, text]
    assert "differs" not in check(tmp_path)[1]


def test_blocks_write(tmp_path):
    """Blocks that grow, that others lack and that stand elsewhere; comments and decorators; bytes outside of them."""
    other = SMALL.replace(b"import os\n", b"import os\r\nx = '\xc3\xa9'  \n").replace(b"print(os)\n", b"print(os)")
    other = other.replace(b"LIMIT = 3\n", b"OWN = 4\n").replace(b"Why", b"How")
    newer = SMALL.replace(b"return 1", b"y = 1\n    return y").replace(b"x: int = 2", b"x: int = 3")
    small(tmp_path, new=newer, other=other)
    code, out = check(tmp_path)
    assert code == 1 and out.count("differs") == 2 and "# How it is so." in out
    done = command("scripts/blocks.py", "--write", tmp_path / "new.py", "--root", tmp_path)
    assert done.returncode == 0 and (tmp_path / "new.py").read_bytes() == newer
    want = other.replace(b"How", b"Why").replace(b"return 1", b"y = 1\n    return y").replace(b"int = 2", b"int = 3")
    assert (tmp_path / "other.py").read_bytes() == want
    assert check(tmp_path) == (0, "2 files with 4 blocks: the same in every file that has them\n")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (blocks.BEGIN, b"", "0 that begin it and 1 that end it"),
        (blocks.END, b"# end", "1 that begin it and 0 that end it"),
        (blocks.END, blocks.END + b"\n" + blocks.END, "1 that begin it and 2 that end it"),
        (blocks.BEGIN, blocks.BEGIN + b"=", "0 that begin it"),
        (b"LIMIT = 3\n", b"LIMIT = 3\nprint(LIMIT)\n", "line 4: what stands in the plumbing must belong"),
        (b"LIMIT = 3\n", b"LIMIT = 3\n\n# Loose.\n", "line 5: what stands in the plumbing must belong"),
        (b"class Two", b"class one", "line 12: one stands twice"),
        (b"return 1", b"return 1)", "line 9: unmatched"),
        (b"LIMIT = 3\n", b"LIMIT = 3\n" + b"\n" * 304, None),
        (b"LIMIT = 3\n", b"LIMIT = 3\n" + b"\n" * 305, "318 lines inside of the plumbing; 317 are the most"),
        (b"print(os)\n", b"print(os)\n" * 339, None),
        (b"print(os)\n", b"print(os)\n" * 340, "341 lines outside of the plumbing; 340 are the most"),
    ],
)
def test_blocks_banners_and_lengths(tmp_path, old, new, complaint):
    small(tmp_path, a=SMALL.replace(old, new))
    files = {"a.py": blocks.parse((tmp_path / "a.py").read_bytes())}
    report = blocks.compare(files)
    assert len(report) == (complaint is not None) and all(complaint in text for text in report)
    if complaint:
        with pytest.raises(SystemExit) as stopped:
            blocks.main(blocks.Args(check=True, root=tmp_path))
        assert stopped.value.code == 1


def test_blocks_errors(tmp_path):
    def error(match, **flags):
        with pytest.raises(SystemExit, match=match):
            blocks.main(blocks.Args(root=tmp_path, **flags))

    error("holds no .py file", check=True)
    error("either --check or --write")
    error("either --check or --write", check=True, write=tmp_path / "a.py")
    broken = SMALL.replace(blocks.END, b"").replace(b"LIMIT = 3", b"LIMIT = 4")
    small(tmp_path, a=SMALL, b=broken)
    error("is none of the files", write=tmp_path / "nonesuch.py")
    error("nothing was written.*\nb.py: the plumbing needs two banners", write=tmp_path / "a.py")
    assert (tmp_path / "b.py").read_bytes() == broken

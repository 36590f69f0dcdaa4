"""scripts/speed.py: what it counts and computes, and a small comparison."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import speed
from conftest import ROOT


def run_script(*flags, cwd):
    """Run speed.py as a user does."""
    line = [sys.executable, ROOT / "scripts" / "speed.py", *map(str, flags)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=500)


SETTINGS = {
    "case": "ppo-hopper",
    "threads": 1,
    "num_envs": 1,
    "device": "cpu",
    "compile": False,
}


def bound_row(bound, **settings):
    """A row with a bound, as a measurement writes it first."""
    return SETTINGS | settings | {"bound": bound, "env": 2 * bound}


def speed_row(who, number, sps, **settings):
    """A row with the speed of a contestant in one round."""
    return SETTINGS | settings | {"who": who, "round": number, "sps": sps}


def test_medians_of_speeds_and_of_the_ratios_within_a_round():
    """The table has the ratio to the better peer."""
    rows = [bound_row(400)]
    for number, ours, sb3, sbx in [(1, 100, 50, 10), (2, 200, 110, 20), (3, 30, 10, 25)]:
        rows.append(speed_row("ours", number, ours))
        rows.append(speed_row("sb3", number, sb3))
        rows.append(speed_row("sbx", number, sbx))
    (group,) = speed.summarize(rows)
    assert group == (
        "ppo-hopper, 1 thread",
        400,
        800,
        {"ours": (100, 30, 200), "sb3": (50, 10, 110), "sbx": (20, 10, 25)},
        {"sb3": 2, "sbx": 10},
    )
    assert speed.format_table([group]).splitlines()[2] == (
        "| ppo-hopper, 1 thread | 100 (30 to 200) | 50 (10 to 110) | 20 (10 to 25) | 2.00 "
        "| 400 (25%) | 800 (12%) |"
    )


def test_every_setting_is_in_the_title():
    rows = []
    for settings in ({}, {"threads": 2}, {"num_envs": 4}, {"device": "cuda", "compile": True}):
        rows.append(bound_row(9, **settings))
        rows.append(speed_row("ours", 1, 5, **settings))
    assert [group.title for group in speed.summarize(rows)] == [
        "ppo-hopper, 1 thread",
        "ppo-hopper, 2 threads",
        "ppo-hopper, 1 thread, 4 envs",
        "ppo-hopper, 1 thread, cuda, compiled",
    ]


def test_two_measurements_of_the_same_settings_are_pooled():
    rows = [bound_row(9), speed_row("ours", 1, 5), bound_row(11), speed_row("ours", 1, 7)]
    (group,) = speed.summarize(rows)
    assert group[1:] == (10, 20, {"ours": (6, 5, 7)}, {})


def test_a_round_without_peers_is_not_compared_with_theirs():
    rows = [bound_row(9), speed_row("ours", 1, 5), speed_row("sb3", 1, 4)]
    rows += [bound_row(9), speed_row("ours", 1, 8)]
    (group,) = speed.summarize(rows)
    assert group.speeds["ours"] == (5, 5, 5)


def test_the_committed_measurements_make_the_table_of_the_page():
    rows = speed.load(ROOT / "results" / "speed.jsonl")
    table = speed.format_table(speed.summarize(rows)).splitlines()
    page = (ROOT / "docs" / "speed.md").read_text().splitlines()
    assert set(table) <= set(page)


def test_operations_are_those_counted_by_hand():
    """DQN learns in one step of ten: forward in both networks, backward in one, none for s."""
    layers = [(4, 128), (128, 128), (128, 2)]
    operations = [2 * 128 * size_in * size_out for size_in, size_out in layers]
    forward = sum(operations)
    # Every layer has a gradient for its weights, all but the first have one for their inputs.
    backward = sum(operations) + sum(operations[1:])
    case = speed.CASES["dqn-cartpole"]._replace(lengths=(1100, 0))
    counted = speed.operations_per_step(case)
    assert counted == pytest.approx((2 * forward + backward) / 10)


def test_more_environments_do_not_change_the_number_of_updates():
    """Minibatches are the same share of a rollout, and the short run of a memory stays as long."""
    ppo = speed.adapt(speed.CASES["ppo-hopper"], num_envs=4, scale=0.5)
    assert ppo.peer_options["batch_size"] == 4 * 64
    assert ppo.product == (256, 64)
    assert ppo.lengths == (8192, 16384)
    sac = speed.adapt(speed.CASES["sac-hopper"], num_envs=4, scale=0.5)
    assert sac.peer_options["batch_size"] == 256
    assert sac.product == (256, 256)
    assert sac.lengths == (1100, 1600)
    assert speed.adapt(speed.CASES["trpo-hopper"], num_envs=1, scale=1).peer_options is None


def test_a_measurement_that_was_cut_off(tmp_path, capsys):
    """The incomplete last line, and settings with nothing but a bound, are left out."""
    rows = [bound_row(9), speed_row("ours", 1, 5), bound_row(9, threads=2)]
    file = tmp_path / "speed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"case": "sac-ho')
    assert speed.load(file) == rows
    assert "the last line of" in capsys.readouterr().err
    assert len(speed.summarize(rows)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torn",
        '{"algo": "sac", "step": 1}',
        "[1, 2]",
        json.dumps(bound_row(9, case="sac-nowhere")),
        json.dumps(SETTINGS),
    ],
)
def test_a_line_that_is_not_a_measurement(tmp_path, line):
    file = tmp_path / "speed.jsonl"
    file.write_text(f"{line}\n{json.dumps(bound_row(9))}")
    with pytest.raises(ValueError, match="line 1 of .* is not a measurement"):
        speed.load(file)


def test_the_command_keeps_a_folder_with_a_space_and_has_compile_only_if_asked():
    case = speed.CASES["ppo-hopper"]
    line = speed.command("ours", case, 100, 1, speed.Args(), Path("a folder/run"))
    assert line[-2:] == ["--run-dir", "a folder/run"]
    assert "--compile" not in line
    args = speed.Args(compile=True)
    assert "--compile" in speed.command("ours", case, 100, 1, args, Path("run"))


def test_a_device_that_does_not_exist(tmp_path):
    flags = ["--device", "nonsense", "--cases", "ppo-cartpole", "--peers"]
    done = run_script(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", 0], "--rounds is 0; it must be above 0"),
        (["--threads", 1, -1], "--threads is -1; it must be above 0"),
        (["--load", "none.jsonl"], "none.jsonl"),
        (["--load", "empty.jsonl"], "--save"),
        (["--output", "speed.xyz"], "must end in .png, .svg or .pdf"),
    ],
)
def test_bad_input_is_one_line_on_stderr(flags, message, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    done = run_script(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_small_comparison_that_is_saved_and_loaded(tmp_path):
    """With Stable-Baselines3 where it is installed. The case is ten seconds longer than noise."""
    flags = ["--cases", "dqn-cartpole", "--rounds", "1", "--peers", "sb3"]
    done = run_script(*flags, "--save", "s.jsonl", "--output", "measured.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    is_installed = importlib.util.find_spec("stable_baselines3") is not None
    contestants = ["ours", "sb3"] if is_installed else ["ours"]
    assert [row["who"] for row in rows if "who" in row] == contestants
    assert ("Stable-Baselines3 is not installed" in done.stderr) != is_installed
    assert all(0 < row["sps"] < 1e6 for row in rows if "sps" in row)

    again = run_script("--load", "s.jsonl", "--output", "loaded.png", cwd=tmp_path)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert again.stdout.splitlines() == table
    figures = [(tmp_path / name).read_bytes() for name in ("measured.png", "loaded.png")]
    assert figures[0] == figures[1]
    assert len(figures[0]) > 5000

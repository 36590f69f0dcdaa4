"""scripts/speed.py: what it counts and computes, and a comparison in small."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load

SCRIPT = ROOT / "scripts" / "speed.py"


@pytest.fixture
def speed():
    return load(SCRIPT)


def call(*flags, cwd):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=500
    )


def measured(who, number, sps, **about):
    about = {"case": "ppo-hopper", "threads": 1, "num_envs": 1, "device": "cpu", "compile": False} | about
    return about | ({"bound": sps, "env": 2 * sps} if who == "bound" else {"who": who, "round": number, "sps": sps})


def test_medians_and_the_ratio_of_rounds(speed):
    """The ratio is that within a round, where the machine was the same, and to the peer that is the better one."""
    rows = [measured("bound", 0, 400)]
    for number, (ours, sb3, sbx) in enumerate([(100, 50, 10), (200, 110, 20), (30, 10, 25)], 1):
        rows += [measured("ours", number, ours), measured("sb3", number, sb3), measured("sbx", number, sbx)]
    [(title, bound, env, speeds, ratios)] = speed.summary(rows)
    assert (title, bound, env) == ("ppo-hopper, 1 thread", 400, 800)
    assert speeds == {"ours": (100, 30, 200), "sb3": (50, 10, 110), "sbx": (20, 10, 25)}
    assert ratios == {"sb3": 2, "sbx": 10}
    line = "| ppo-hopper, 1 thread | 100 (30 to 200) | 50 (10 to 110) | 20 (10 to 25) | 2.00 | 400 (25%) | 800 (12%) |"
    assert speed.table(speed.summary(rows)).splitlines()[2] == line


def test_every_axis_is_in_the_title_and_sessions_pool(speed):
    axes = [{}, {"threads": 2}, {"num_envs": 4}, {"device": "cuda", "compile": True}]
    rows = [row for axis in axes for row in (measured("bound", 0, 9, **axis), measured("ours", 1, 5, **axis))]
    rows += [measured("bound", 0, 11), measured("ours", 1, 7)]  # a second call, saved into the same file
    titles = [group[0] for group in speed.summary(rows)]
    ends = ["1 thread", "2 threads", "1 thread, 4 envs", "1 thread, cuda, compiled"]
    assert titles == ["ppo-hopper, " + end for end in ends]
    assert speed.summary(rows)[0][1:] == (10, 20, {"ours": (6, 5, 7)}, {})


def test_operations_are_those_counted_by_hand(speed):
    """DQN, a step in ten learning: a forward pass of both networks, a backward one of one, no gradient for s."""
    layers = [(4, 128), (128, 128), (128, 2)]
    forward = sum(2 * 128 * i * o for i, o in layers)
    backward = forward + sum(2 * 128 * i * o for i, o in layers[1:])
    case = speed.CASES["dqn-cartpole"]._replace(lengths=(1100, 0))
    assert speed.operations(case) == pytest.approx((2 * forward + backward) / 10)


def test_more_environments_change_no_update(speed):
    """As many updates a step as with one, in minibatches as large a part of a rollout; the short run stays."""
    ppo = speed.lengthen(speed.CASES["ppo-hopper"], 4, 0.5)
    assert ppo.theirs["batch_size"] == 4 * 64 and ppo.product == (256, 64) and ppo.lengths == [8192, 16384]
    sac = speed.lengthen(speed.CASES["sac-hopper"], 4, 0.5)
    assert sac.theirs["batch_size"] == 256 and sac.product == (256, 256) and sac.lengths == [1100, 1600]
    assert speed.lengthen(speed.CASES["trpo-hopper"], 1, 1).theirs is None


def test_a_round_without_peers_is_not_set_beside_theirs(speed):
    rows = [measured("bound", 0, 9), measured("ours", 1, 5), measured("sb3", 1, 4), measured("bound", 0, 9)]
    assert speed.summary([*rows, measured("ours", 1, 8)])[0][3]["ours"] == (5, 5, 5)


def test_a_device_that_is_not_there_is_said(tmp_path):
    done = call("--device", "nonsense", "--cases", "ppo-cartpole", "--peers", cwd=tmp_path)
    assert done.returncode != 0 and "nonsense" in done.stderr and "Traceback" not in done.stderr


def test_what_was_cut_off_is_left_out(speed, tmp_path, capsys):
    """A last line that was not finished, and a case of which there is nothing but the bound."""
    file = tmp_path / "s.jsonl"
    whole = [measured("bound", 0, 9), measured("ours", 1, 5), measured("bound", 0, 9) | {"threads": 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in whole) + '{"case": "sac-ho')
    rows = [*speed.read(file)]
    assert rows == whole and "last line of" in capsys.readouterr().err
    assert len(speed.summary(rows)) == 1
    for line in ("torn", '{"algo": "sac", "step": 1}', "[1, 2]", json.dumps(whole[0] | {"case": "sac-nowhere"})):
        file.write_text(f"{line}\n{json.dumps(whole[0])}")
        with pytest.raises(SystemExit, match="line 1 is no measurement"):
            [*speed.read(file)]


def test_a_folder_with_a_space(speed):
    args = speed.Args()
    line = speed.command("ours", speed.CASES["ppo-hopper"], 100, 1, args, Path("a folder/run"))
    assert line[-2:] == ["--run-dir", "a folder/run"] and "--compile" not in line
    args.compile = True
    assert "--compile" in speed.command("ours", speed.CASES["ppo-hopper"], 100, 1, args, Path("run"))


WRONG = [(["--rounds", 0], "above 0"), (["--load", "none.jsonl"], "none.jsonl"), (["--load", "empty.jsonl"], "--save")]
WRONG += [(["--output", "speed.xyz"], "must end in .png, .svg or .pdf")]


@pytest.mark.parametrize("flags, words", WRONG)
def test_bad_input_is_one_sentence(flags, words, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    done = call(*flags, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_comparison_in_small(speed, tmp_path):
    """With Stable-Baselines3 where it is installed; its process runs as ours does, and what was saved can be loaded."""
    flags = ["--cases", "dqn-cartpole", "--rounds", "1", "--peers", "sb3"]  # ten seconds longer than what noise hides
    done = call(*flags, "--save", "s.jsonl", "--output", "one.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    installed = importlib.util.find_spec("stable_baselines3") is not None
    assert [row["who"] for row in rows if "who" in row] == (["ours", "sb3"] if installed else ["ours"])
    assert ("Stable-Baselines3 is not installed, and left out" in done.stderr) != installed
    assert all(0 < row["sps"] < 1e6 for row in rows if "sps" in row)
    again = call("--load", "s.jsonl", "--output", "two.png", cwd=tmp_path)
    assert again.stdout == "".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("|"))
    assert (tmp_path / "one.png").stat().st_size == (tmp_path / "two.png").stat().st_size > 5000

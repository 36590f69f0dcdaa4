"""What a run shows beside its metrics: trackers, videos, progress."""

import json
import re

import pytest
from conftest import rows, run, two


@pytest.mark.slow
@two
def test_tensorboard_mirrors_the_metrics(path, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = run(path, "--track", "tensorboard", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("episode/return", "eval/return"):
        theirs = [(event.step, event.value) for event in events.Scalars(name)]
        ours = [(row["step"], row[name]) for row in rows(tmp_path / "run") if name in row]
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert all(abs(a - b) < 1e-3 * abs(a) for (_, a), (_, b) in zip(ours, theirs))


@pytest.mark.slow
@two
def test_a_tracker_that_is_not_installed_is_named(path, tmp_path):
    folder, track = tmp_path / "run", ["--track", "trackio", "--run-dir", tmp_path / "run"]
    process = run(path, *track, cwd=tmp_path)
    assert process.returncode != 0 and "No module named 'trackio'" in process.stderr
    assert "Traceback" not in process.stderr
    assert run(path, "--run-dir", folder).returncode == 0  # nothing is left behind that stands in the way
    result = (folder / "result.json").read_bytes()
    assert "No module named 'trackio'" in run(path, "--resume", *track, cwd=tmp_path).stderr
    assert (folder / "result.json").read_bytes() == result  # that run is as done as it was


@pytest.mark.slow
@two
def test_a_run_has_an_id_of_its_own_which_it_keeps(path, tmp_path):
    """What trackers know it by: folders of the same name are others, a run that is resumed is the same one."""
    ids = []
    for folder, flags in (("a/run", []), ("b/run", []), ("a/run", ["--resume"])):
        assert run(path, *flags, "--run-dir", tmp_path / folder).returncode == 0
        ids.append(json.loads((tmp_path / folder / "config.json").read_text())["id"])
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.slow
@two
def test_an_episode_of_every_evaluation_is_filmed(path, tmp_path):
    process = run(path, "--capture-video", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    videos = sorted(file.name for file in (tmp_path / "run" / "videos").glob("*.mp4"))
    assert [int(re.match(r"step-(\d+)-", name).group(1)) for name in videos] == [200, 400, 600]
    # And at once: before the checkpoint that follows the evaluation.
    film, checkpoint = tmp_path / "run" / "videos" / videos[1], tmp_path / "run" / "checkpoint.prev.pt"
    assert film.stat().st_mtime < checkpoint.stat().st_mtime


@two
def test_progress_is_in_plain_lines_where_there_is_no_terminal(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert "\r" not in process.stdout + process.stderr
    assert len(re.findall(r"^step \d+ of 600: return", process.stdout, re.M)) == 3
    assert re.search(r"100%.* 600/600 .*steps/s.*return -?\d", process.stdout)

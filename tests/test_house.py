"""The house rules: what every file says alike, and the table of known bugs with what stands guard against each."""

import ast
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from blocks import MOST, MOST_WITH_RANKS, fingerprint
from conftest import ALGOS, ROOT, load, two

RUN_FLAGS = """env_id exp_name seed total_timesteps num_envs device threads run_dir resume eval_every eval_episodes
    checkpoint_every track capture_video compile cuda_graph""".split()


def test_the_header_for_uv_agrees_with_requirements(path):
    header = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.M | re.S).group(1)
    header = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(True)))
    assert header["requires-python"] == ">=3.11"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[<>=\[;]", line)[0]: line for line in lines if line and not line.startswith("#")}
    for floor in header["dependencies"]:
        name = re.split(r"[<>=\[;]", floor)[0]
        assert name == "torch" or required[name] == floor  # torch is pinned there, and a floor here
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    named = {re.split(r"[<>=\[;]", floor)[0] for floor in header["dependencies"]}
    assert imported & set(required) <= named and not imported & {p.stem for p in ALGOS}


def fields(path):
    """The fields of Args, each with its line."""
    text = path.read_text()
    (args,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = text.splitlines()
    return {node.target.id: lines[node.lineno - 1] for node in args.body if isinstance(node, ast.AnnAssign)}


def test_the_run_flags_are_the_same_everywhere(path):
    ours, first = fields(path), fields(ALGOS[0])
    same = [name for name in RUN_FLAGS if name not in ("env_id", "threads", "eval_every")]  # whose defaults may differ
    assert list(ours)[-len(RUN_FLAGS) :] == RUN_FLAGS
    assert [ours[name] for name in same] == [first[name] for name in same]


def test_every_flag_is_explained(path):
    assert all("  # " in line for line in fields(path).values())


def test_every_equation_of_the_docstring_is_found_in_the_code(path):
    tree = ast.parse(path.read_text())
    numbers = set(re.findall(r"\((\d+)\)$", ast.get_docstring(tree), re.M))
    code = path.read_text().split('"""', 2)[2]
    assert numbers and numbers <= set(re.findall(r"\((\d+)\)", code))


def test_every_metric_is_explained(path):
    text = path.read_text()
    logged = set(re.findall(r'"((?:loss|value|policy|explore|speed)/\w+)"', text))
    assert logged and all(name in ast.get_docstring(ast.parse(text)) for name in logged)


# The bugs of well-known implementations, by number; each with the test that would see it here, or with the reason why
# the line is too plain to need one.
PITFALLS = {
    1: "test_probes.py::test_a_time_limit_is_not_an_end",
    2: "test_probes.py::test_an_end_is_an_end",
    3: "test_on_policy.py::test_gae_by_its_definition_with_ends_and_cuts_everywhere",
    4: "test_probes.py::test_a_time_limit_is_not_an_end",
    5: "test_on_policy.py::test_gae_by_its_definition_with_ends_and_cuts_everywhere",
    6: "test_probes.py::test_the_memory_holds_what_happened",
    7: "test_probes.py::test_the_memory_holds_what_happened",
    8: "no n-step returns",
    9: "test_sac.py::test_update_is_the_pseudocode",
    10: "test_probes.py::test_entropy_is_worth_nothing_after_the_end",
    11: "test_sac.py::test_target_entropy",
    12: "test_sac.py::test_losses_by_hand",
    13: "test_sac.py::test_log_probability_is_that_of_a_numerical_jacobian",
    14: "test_probes.py::test_a_policy_is_learnt_alike_in_any_units",
    15: "test_q_learning.py::test_target_noise_is_clipped_scaled_and_drawn_for_each",
    16: "test_q_learning.py::test_exploration_is_drawn_for_each_environment_and_stays_in_the_box",
    17: "test_q_learning.py::test_the_policy_moves_at_every_second_gradient_step",
    18: "test_probes.py::test_dqn_learns_and_moves_its_target_by_environment_steps",
    19: "test_sac.py::test_the_actor_step_leaves_no_trace_in_the_critics",
    20: "test_on_policy.py::test_an_epoch_too_far_is_the_last_of_its_rollout",
    21: "test_on_policy.py::test_one_sample_is_standardised_to_zero",
    22: "test_on_policy.py::test_a_policy_that_was_normalised_acts_alike_when_loaded",
    23: "test_resume.py::test_evaluation_does_not_touch_training",
    24: "test_on_policy.py::test_rewards_are_scaled_by_sums_that_stop_at_cuts",
    25: "test_q_learning.py::test_epsilon_falls_as_it_should",
    26: "test_standalone.py::test_the_policy_loads_without_an_environment",
    27: "test_resume.py::test_two_runs_of_a_seed_agree_and_two_seeds_do_not",
    28: "test_probes.py::test_gradient_steps_per_environment_step",
    29: "test_probes.py::test_gradient_steps_per_environment_step",
    30: "test_resume.py::test_killed_three_times_it_ends_bit_equal",
    31: "test_house.py::test_flags_are_annotated_honestly",
    32: "test_outputs.py::test_threads_and_seeds_are_set",
    33: "test_compile.py::test_fifty_captured_updates_are_the_plain_ones",
    34: "test_on_policy.py::test_two_ranks_learn_what_one_does",
    35: "test_faults.py::test_a_damaged_checkpoint_gives_way_to_the_one_before",
    36: "test_scripts.py",
}


@pytest.mark.parametrize("number", range(1, 37))
def test_pitfalls_have_their_guard(number):
    guard = PITFALLS[number]
    if guard.startswith("test_"):
        file, _, name = guard.partition("::")
        tests = {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")}
        assert not name or name in tests


def test_flags_are_annotated_honestly(path):
    """A default has the type that its flag would give it: 5e3 is no int, and what may be None says so."""
    (args,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    for field in (node for node in args.body if isinstance(node, ast.AnnAssign)):
        kind = ast.unparse(field.annotation)
        if isinstance(field.value, ast.Constant) and not kind.startswith("Literal"):
            expected = "None" if field.value.value is None else type(field.value.value).__name__
            assert expected in kind.split(" | "), f"{field.target.id}: {kind} = {field.value.value}"


@two
def test_numbers_too_small_to_be_normal_are_0(path):
    """Where Adam's moments of a dead unit end up: with them, SAC's first two thousand updates took 9 % longer."""
    module = load(path)
    torch.set_flush_denormal(False)  # whatever ran before
    try:
        assert torch.tensor(1e-39).mul(1) > 0
        module.start(module.Args(device="cpu", threads=torch.get_num_threads()), "", "", "")
        assert torch.tensor(1e-39).mul(1) == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("folder", ["algos", "kernels", "scripts", "tests"])
def test_nothing_names_the_place_where_it_was_made(folder):
    for file in Path(ROOT / folder).glob("*.py"):
        assert not re.search(r"/(home|root|Users|mnt)/\w", file.read_text().replace("(home|root|Users|mnt)", "")), file


@pytest.mark.skipif(not shutil.which("diff"), reason="needs diff")
def test_readme_counts_the_lines_that_differ_between_siblings():
    pairs = re.findall(r"^\| `(algos/\S+) (algos/\S+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(pairs) == 4
    for *files, count in pairs:
        said = subprocess.run(["diff", *files], cwd=ROOT, capture_output=True, text=True).stdout
        assert len(re.findall("^[<>]", said, re.M)) == int(count), files


def test_readme_says_how_long_a_file_may_be():
    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(r"At most (\d+) lines without the plumbing, and (\d+) of plumbing; .* to (\d+) and (\d+)\.", text)
    assert [int(n) for n in said.groups()] == [*MOST.values(), *MOST_WITH_RANKS.values()]


def test_readme_has_a_line_for_every_file_of_the_suite():
    listed = re.findall(r"^\| `tests/(test_\w+\.py)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


def test_results_name_the_algorithm_that_made_them():
    """What a file's algorithm is no longer is listed in results/README.md, and nothing else is."""
    now = {path.stem: fingerprint(path.read_bytes()) for path in ALGOS}
    stale = set()
    for file in (ROOT / "results").glob("*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            if "algo" in row and row.get("code") != now[row["algo"]]:
                stale.add((file.name, row["algo"]))
    listed = re.findall(r"^\* `(.+)`: (.+)$", (ROOT / "results" / "README.md").read_text(), re.M)
    assert stale == {(file, algo) for file, algos in listed for algo in algos.split(", ")}


def test_the_fingerprint_is_of_the_algorithm_and_of_no_words():
    text = (ROOT / "algos" / "ppo.py").read_text()
    same = [
        text.replace('"""(5): value', '"""Equation five: value'),
        text.replace("  # of policy and value function", "  # of both"),
        text.replace("    return run.last\n", "    return {}\n"),
        text.replace("import json\n", "import json\nimport abc\n", 1),
    ]
    other = [text.replace(a, b) for a, b in (("= 3e-4", "= 2e-4"), ("torch.minimum", "torch.maximum"), ("-0.5)", "0)"))]
    assert len({text, *same, *other}) == 8
    prints = [fingerprint(x.encode()) for x in (text, *same, *other)]
    assert len({*prints[:5]}) == 1 and len({*prints}) == 4

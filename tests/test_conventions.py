"""Conventions that hold in every file, and the page of known bugs."""

import ast
import re
import tomllib

import pytest
import torch
from common import load_algo
from conftest import PATHS, ROOT, one_of_each_family

CODE = sorted(
    file
    for folder in ("algos", "kernels", "scripts", "tests")
    for file in (ROOT / folder).glob("*.py")
)
RUN_FLAGS = [
    "env_id",
    "exp_name",
    "seed",
    "total_timesteps",
    "num_envs",
    "device",
    "threads",
    "run_dir",
    "resume",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "track",
    "capture_video",
    "compile",
    "cuda_graph",
]
BANNER = "# ==== Plumbing: identical in every file. The algorithm ends here. "


@pytest.fixture(params=CODE, ids=lambda file: f"{file.parent.name}-{file.stem}")
def file(request):
    """Each Python file of the repository in turn."""
    return request.param


def package_name(requirement):
    """The name in a line of requirements.txt."""
    return re.split(r"[<>=\[;]", requirement)[0]


def imported_packages(path):
    """The top-level names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_uv_header_agrees_with_the_requirements(path):
    header = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.M | re.S).group(1)
    lines = header.splitlines(keepends=True)
    header = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert header["requires-python"] == ">=3.11"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {package_name(line): line for line in lines if line and not line.startswith("#")}
    for requirement in header["dependencies"]:
        name = package_name(requirement)
        # requirements.txt pins torch; the header gives its lowest version.
        assert name == "torch" or required[name] == requirement
    named = {package_name(requirement) for requirement in header["dependencies"]}
    assert imported_packages(path) & set(required) <= named


def test_a_file_of_algos_imports_no_other_file_of_the_repository(path):
    others = {other.stem for other in CODE if other.parent.name in ("algos", "kernels", "scripts")}
    assert not imported_packages(path) & others


def test_a_file_of_algos_names_no_sibling(path):
    """A copied file has no siblings."""
    for other in PATHS:
        if other != path:
            assert f"{other.stem}.py" not in path.read_text()


def fields(path):
    """The fields of Args: name -> source line."""
    text = path.read_text()
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name == "Args"]
    lines = text.splitlines()
    nodes = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.lineno - 1] for node in nodes}


def test_the_run_flags_are_the_same_everywhere(path):
    ours = fields(path)
    first = fields(PATHS[0])
    assert list(ours)[-len(RUN_FLAGS) :] == RUN_FLAGS
    defaults_may_differ = ("env_id", "threads", "eval_every")
    for name in RUN_FLAGS:
        if name not in defaults_may_differ:
            assert ours[name] == first[name]


def test_every_flag_is_explained(path):
    for line in fields(path).values():
        assert "  # " in line


def test_every_flag_has_a_range_or_a_type_without_one(path):
    """A number that a flag sets is checked by its annotation."""
    for name, line in fields(path).items():
        annotation = line.split(":", 1)[1].split("=")[0].strip()
        if name == "target_entropy":  # its range depends on the environment
            continue
        assert annotation not in ("int", "float", "int | None", "float | None"), line


def test_flag_defaults_have_the_type_of_their_annotation(path):
    """check_flags is strict: 5e3 is not an int."""
    module = load_algo(path)
    module.check_flags(module.Args(device="cpu", threads=torch.get_num_threads()))


def test_every_equation_of_the_docstring_is_found_in_the_code(path):
    tree = ast.parse(path.read_text())
    numbers = set(re.findall(r"\((\d+)\)$", ast.get_docstring(tree), re.M))
    code = path.read_text().split('"""', 2)[2]
    assert numbers
    assert numbers <= set(re.findall(r"\((\d+)\)", code))


def test_every_metric_is_explained(path):
    text = path.read_text()
    logged = set(re.findall(r'"((?:loss|value|policy|explore|speed)/\w+)"', text))
    assert logged
    for name in logged:
        assert name in ast.get_docstring(ast.parse(text))


def test_update_stands_close_to_the_loop_that_calls_it(path):
    """At most 60 lines from the end of `update` to the loop in `train`, above the banner."""
    lines = path.read_text().splitlines()
    (banner,) = [number for number, line in enumerate(lines, 1) if line.startswith(BANNER)]
    update = None
    loop = None
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "update" and node.lineno < banner:
            update = max(node.end_lineno, update or 0)
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            loop = min(child.lineno for child in ast.walk(node) if isinstance(child, ast.For))
    assert 0 < loop - update <= 60
    assert loop < banner


# The mechanical rules of style, on the syntax tree.


def broken_rules(tree, file):
    """The rules that a file breaks, with line numbers."""
    broken = []
    functions = {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[child] = node.name
            else:
                functions[child] = functions.get(node)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Expr) and not is_statement(node.value):
            broken.append(f"line {line}: an expression stands as a statement")
        if isinstance(node, ast.Assign):
            targets = node.targets
            if isinstance(node.value, ast.Lambda):
                broken.append(f"line {line}: a lambda is bound to a name: write a function")
            for target in targets:
                broken += [f"line {line}: {text}" for text in broken_target(target)]
            if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                if len(targets[0].elts) > 2:
                    broken.append(f"line {line}: {len(targets[0].elts)} assignments in one")
        if isinstance(node, ast.NamedExpr) and file.parent.name == "algos":
            broken.append(f"line {line}: a walrus")
        if is_sys_exit(node) and functions.get(node) != "main":
            broken.append(f"line {line}: sys.exit outside of main: raise an exception")
        if isinstance(node, ast.Import | ast.ImportFrom) and file.parent.name != "tests":
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any("mock" in name for name in names):
                broken.append(f"line {line}: a mock outside of tests")
    return broken


def is_statement(value):
    """Whether an expression may stand alone: a call, a docstring, yield or await."""
    docstring = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return docstring or isinstance(value, ast.Call | ast.Yield | ast.YieldFrom | ast.Await)


def broken_target(target):
    """What is wrong with the left side of an assignment."""
    if isinstance(target, ast.Starred):
        return ["a starred target"]
    broken = []
    for part in getattr(target, "elts", []):
        if isinstance(part, ast.Starred):
            broken.append("a starred target")
        if isinstance(part, ast.Tuple | ast.List):
            broken.append("nested targets")
    return broken


def is_sys_exit(node):
    """Whether a node calls sys.exit."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit"


def test_the_style_rules_hold(file):
    assert broken_rules(ast.parse(file.read_text()), file) == []


@pytest.mark.parametrize(
    "code",
    [
        "a and f()",
        "[f() for x in y]",
        "f() if a else g()",
        "f = lambda: 0",
        "self.f = lambda: 0",
        "a, *b = c",
        "(a, b), c = d",
        "a, b, c = 1, 2, 3",
        "if a := f(): pass",
        "def f():\n    sys.exit('error')",
        "from unittest import mock",
    ],
)
def test_the_style_rules_can_fail(code):
    assert broken_rules(ast.parse(code), ROOT / "algos" / "x.py")


@pytest.mark.parametrize(
    "code",
    ["f()", "'docs'", "a, b = f()", "a, b = 1, 2", "def main():\n    sys.exit(2)", "x = [0]"],
)
def test_the_style_rules_allow_plain_statements(code):
    assert broken_rules(ast.parse(code), ROOT / "algos" / "x.py") == []


def test_nothing_names_the_place_where_it_was_made(file):
    text = file.read_text().replace("(home|root|Users|mnt)", "")
    assert not re.search(r"/(home|root|Users|mnt)/\w", text)


@one_of_each_family
def test_denormal_numbers_are_flushed_to_zero(path):
    """Adam moments of dead units decay into them; they slowed 2,000 updates of SAC by 9 %."""
    module = load_algo(path)
    torch.set_flush_denormal(False)
    try:
        assert torch.tensor(1e-39).mul(1) > 0
        module.check_flags(module.Args(device="cpu", threads=torch.get_num_threads()))
        assert torch.tensor(1e-39).mul(1) == 0
    finally:
        torch.set_flush_denormal(False)


# docs/pitfalls.md names, for every known bug, the line of ours that does it right and its test.

PITFALLS = (ROOT / "docs" / "pitfalls.md").read_text()
OUR_LINES = re.findall(r"^\*\*Our line:\*\* `(\S+)`: `(.+)`$", PITFALLS, re.M)
OUR_TESTS = re.findall(r"^\*\*Our test:\*\* `(tests/\w+\.py)::(\w+)`$", PITFALLS, re.M)


def test_every_pitfall_has_a_line_and_a_test():
    entries = PITFALLS.split("\n## ")[1:]
    pitfalls = [entry for entry in entries if "**Our line:**" in entry or "**Our test:**" in entry]
    assert PITFALLS.count("**Our line:**") >= 36
    assert PITFALLS.count("**Our line:**") == PITFALLS.count("**Our test:**")
    assert pitfalls


@pytest.mark.parametrize("name, code", OUR_LINES)
def test_the_line_of_a_pitfall_exists(name, code):
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    assert any(code in line for line in lines)


@pytest.mark.parametrize("name, test", OUR_TESTS)
def test_the_test_of_a_pitfall_exists(name, test):
    functions = [
        node.name for node in ast.parse((ROOT / name).read_text()).body if hasattr(node, "name")
    ]
    assert test in functions


# README


def test_ci_runs_the_test_command_of_the_readme():
    """CI takes the command from README, so that what README says is what was tested."""
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^python3 -m venv \.venv .*pytest", readme_test_command(), re.M)


def readme_test_command():
    """The command of README that makes an environment and runs the tests."""
    blocks = re.findall(
        r"^```(?:sh|bash)?\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = [line for block in blocks for line in block.splitlines()]
    (command,) = [line for line in lines if "venv" in line and "pytest" in line]
    return command


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130

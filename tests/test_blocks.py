"""scripts/blocks.py on the files of algos/, on changed copies of them and on small files."""

import subprocess
import sys
from pathlib import Path

import blocks
import pytest
from conftest import PATHS, ROOT

# Two lines surround the plumbing: the banner and the `if` at the end.
SMALL = b"""import os
{BANNER}
LIMIT = 3


# Why it is so.
@staticmethod
def one():
    return 1


class Two:
    x: int = 2


{LAST_LINE}
    print(os)
"""
SMALL = SMALL.replace(b"{BANNER}", blocks.BANNER).replace(b"{LAST_LINE}", blocks.LAST_LINE)


def run_script(*flags):
    """Run blocks.py as a user does; returns its exit status and its output."""
    line = [sys.executable, ROOT / "scripts" / "blocks.py", *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def write_files(folder, **files):
    """Write each text into the file with that name and .py."""
    for name, text in files.items():
        (folder / f"{name}.py").write_bytes(text)


def test_the_plumbing_is_identical_in_every_file_of_algos():
    status, output = run_script("--check")
    assert status == 0, output
    for path in PATHS:
        assert f"{path.name}: " in output


def test_the_number_of_lines_up_to_the_banner(tmp_path):
    write_files(tmp_path, small=b"# a comment\n" + SMALL)
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 0
    assert "small.py: 2 lines up to the banner\n" in output


def test_a_block_has_its_decorators_and_the_comments_above_it():
    source = blocks.parse(SMALL)
    assert source.problems == []
    assert source.above == []
    assert b"".join(source.lines) == SMALL
    assert {name: source.block(name) for name in source.blocks} == {
        "LIMIT": b"LIMIT = 3\n",
        "one": b"# Why it is so.\n@staticmethod\ndef one():\n    return 1\n",
        "Two": b"class Two:\n    x: int = 2\n",
    }


def test_one_changed_word_is_found_and_repaired(tmp_path):
    """In copies of the real files; nothing else changes, not even other definitions."""
    sac = (ROOT / "algos" / "sac.py").read_bytes()
    # sac.py has no block load__policy, so --write must keep it.
    td3 = sac.replace(b"def load_policy", b"def load__policy")
    ddpg = td3.replace(b"Evaluations must end", b"Evaluations MUST end")
    assert len({sac, td3, ddpg}) == 3
    write_files(tmp_path, sac=sac, td3=td3, ddpg=ddpg)
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 1
    assert "make_env differs between\n  sac.py, td3.py\n  ddpg.py\n" in output
    assert "MUST end" in output
    assert output.count("differs") == 1

    _, output = run_script("--write", tmp_path / "sac.py", "--root", tmp_path)
    assert "ddpg.py: copied the blocks of sac.py\n" in output
    assert "td3.py: copied" not in output
    assert (tmp_path / "sac.py").read_bytes() == sac
    assert (tmp_path / "td3.py").read_bytes() == td3
    assert (tmp_path / "ddpg.py").read_bytes() == td3
    _, output = run_script("--check", "--root", tmp_path)
    assert "differs" not in output


def test_write_replaces_blocks_and_keeps_every_other_byte(tmp_path):
    """Blocks may grow, be missing and be elsewhere; comments and decorators belong to them."""
    new = SMALL.replace(b"return 1", b"y = 1\n    return y").replace(b"x: int = 2", b"x: int = 3")
    old = SMALL.replace(b"import os\n", b"import os\r\nx = '\xc3\xa9'  \n")
    old = old.replace(b"print(os)\n", b"print(os)")
    old = old.replace(b"LIMIT = 3\n", b"OWN = 4\n").replace(b"Why", b"How")
    write_files(tmp_path, new=new, old=old)
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 1
    assert output.count("differs") == 2
    assert "# How it is so." in output

    status, _ = run_script("--write", tmp_path / "new.py", "--root", tmp_path)
    assert status == 0
    assert (tmp_path / "new.py").read_bytes() == new
    expected = old.replace(b"How", b"Why").replace(b"return 1", b"y = 1\n    return y")
    expected = expected.replace(b"int = 2", b"int = 3")
    assert (tmp_path / "old.py").read_bytes() == expected
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 0
    assert output.endswith("2 files with 4 blocks: the same in every file that has them\n")


def test_a_carriage_return_is_a_difference_that_is_shown(tmp_path):
    write_files(tmp_path, a=SMALL, b=SMALL.replace(b"return 1\n", b"return 1\r\n"))
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 1
    assert "return 1\\r" in output


def test_a_long_difference_is_shortened(tmp_path):
    lines = b"".join(b"    x = %d\n" % i for i in range(30))
    write_files(tmp_path, a=SMALL, b=SMALL.replace(b"    return 1\n", lines + b"    return 1\n"))
    _, output = run_script("--check", "--root", tmp_path)
    shown = [line for line in output.splitlines() if line.startswith("    ")]
    assert len(shown) == blocks.DIFF_LINES + 1
    assert "more lines" in shown[-1]


def test_a_name_above_the_banner_here_and_below_it_there(tmp_path):
    moved = SMALL.replace(b"LIMIT = 3\n", b"").replace(b"import os\n", b"import os\nLIMIT = 3\n")
    write_files(tmp_path, a=SMALL, b=moved)
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 1
    assert "LIMIT is above the banner in b.py, below it in a.py" in output


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (blocks.BANNER, b"", "found 0 banner lines and 1 lines if __name__"),
        (blocks.LAST_LINE, b"if True:", "found 1 banner lines and 0 lines if __name__"),
        (
            blocks.LAST_LINE,
            blocks.LAST_LINE + b"\n    pass\n" + blocks.LAST_LINE,
            "found 1 banner lines and 2 lines if __name__",
        ),
        (blocks.BANNER, blocks.BANNER + b"=", "found 0 banner lines"),
        (
            b"LIMIT = 3\n",
            b"LIMIT = 3\nprint(LIMIT)\n",
            "line 4: belongs to no function, class or assignment",
        ),
        (
            b"LIMIT = 3\n",
            b"LIMIT = 3\n\n# Loose.\n",
            "line 5: belongs to no function, class or assignment",
        ),
        (b"class Two", b"class one", "line 12: one is defined twice in the plumbing"),
        (b"return 1", b"return 1)", "line 9: unmatched"),
    ],
)
def test_a_problem_of_one_file(tmp_path, old, new, problem):
    text = SMALL.replace(old, new)
    assert text != SMALL
    write_files(tmp_path, a=text)
    (report,) = blocks.compare(blocks.read(tmp_path))
    assert report.startswith("a.py: ")
    assert problem in report
    status, output = run_script("--check", "--root", tmp_path)
    assert status == 1
    assert problem in output


def test_the_banner_after_the_last_line(tmp_path):
    swapped = SMALL.replace(blocks.BANNER, b"?").replace(blocks.LAST_LINE, blocks.BANNER)
    swapped = swapped.replace(b"?", blocks.LAST_LINE)
    (report,) = blocks.compare({"a.py": blocks.parse(swapped)})
    assert "in this order" in report


def check_error(match, *flags):
    """The script prints one line with this text on stderr and exits with status 2."""
    status, output = run_script(*flags)
    assert status == 2
    assert output.startswith("error: ")
    assert match in output
    assert len(output.splitlines()) == 1


def test_bad_input_is_one_line_on_stderr(tmp_path):
    root = ["--root", tmp_path]
    check_error("holds no .py file", "--check", *root)
    check_error("pass either --check or --write", *root)
    check_error("pass either --check or --write", "--check", "--write", tmp_path / "a.py", *root)
    broken = SMALL.replace(blocks.LAST_LINE, b"if True:").replace(b"LIMIT = 3", b"LIMIT = 4")
    write_files(tmp_path, a=SMALL, b=broken)
    check_error("is not a file in", "--write", tmp_path / "nonesuch.py", *root)
    check_error("is not a file in", "--write", Path("a.py"), *root)
    check_error(
        "nothing was written, because a file has no blocks: b.py: found 1 banner lines",
        *("--write", tmp_path / "a.py", *root),
    )
    assert (tmp_path / "b.py").read_bytes() == broken

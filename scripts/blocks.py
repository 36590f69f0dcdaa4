"""Keep the plumbing of algos/*.py identical: a block is the same text in every file that has it.

    python scripts/blocks.py --check                 report what differs; exit status 1 if any does
    python scripts/blocks.py --write algos/sac.py    copy the blocks of that file into the others

The plumbing is everything between the banner line and the line `if __name__ == "__main__":`. A
block is a function, a class or an assignment at the top level of the plumbing, together with its
decorators and the comments directly above it. Blocks are compared byte by byte. A file need not
have every block, and --write neither adds nor removes blocks.

--check reports three more things: a line of the plumbing that belongs to no block, because nothing
would compare it; a name that is defined above the banner in one file and below it in another; and
the number of lines above the banner, which is what a reader of the algorithm reads.
"""

import ast
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

BANNER = b"# ==== Plumbing: identical in every file. The algorithm ends here. ".ljust(100, b"=")
LAST_LINE = b'if __name__ == "__main__":'
DIFF_LINES = 16  # lines of a diff that are shown


@dataclass
class Args:
    """Keep the plumbing of algos/*.py identical: a block is the same text in every file."""

    check: bool = False  # report what differs between the files; exit status 1 if anything does
    write: Path | None = None  # copy the blocks of this file into the other files
    root: Path = Path(__file__).resolve().parent.parent / "algos"  # folder of the files


class Source(NamedTuple):
    """One file, taken apart. Line numbers count from 0."""

    lines: list  # the lines as bytes, with their line ends
    above: list  # names defined above the banner
    blocks: dict  # name of a plumbing block -> (first line, line after the last)
    banner: int | None  # line of the banner
    problems: list  # what is wrong with this file alone, one text each

    def block(self, name):
        """The bytes of a plumbing block."""
        first, last = self.blocks[name]
        return b"".join(self.lines[first:last])


def parse(text):
    """Take the bytes of a file apart."""
    lines = text.splitlines(keepends=True)
    bare_lines = [line.rstrip(b"\r\n") for line in lines]
    banners = [i for i, line in enumerate(bare_lines) if line == BANNER]
    ends = [i for i, line in enumerate(bare_lines) if line == LAST_LINE]
    if len(banners) != 1 or len(ends) != 1 or banners > ends:
        problem = (
            f"found {len(banners)} banner lines and {len(ends)} lines {LAST_LINE.decode()}: "
            f"there must be one of each, in this order; the banner is {BANNER.decode()}"
        )
        return Source(lines, [], {}, None, [problem])
    banner = banners[0]
    end = ends[0]
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return Source(lines, [], {}, banner, [f"line {error.lineno}: {error.msg}"])

    above = []
    blocks = {}
    problems = []
    covered = set()
    for node in tree.body:
        name = defined_name(node)
        if name is None:
            continue
        if node.lineno - 1 < banner:
            above.append(name)
        elif node.lineno - 1 < end:
            first = first_line(node, bare_lines, banner)
            if name in blocks:
                problems.append(f"line {first + 1}: {name} is defined twice in the plumbing")
            blocks[name] = (first, node.end_lineno)
            covered.update(range(first, node.end_lineno))

    for i in range(banner + 1, end):
        if bare_lines[i].strip() and i not in covered:
            problems.append(f"line {i + 1}: belongs to no function, class or assignment")
            break
    return Source(lines, above, blocks, banner, problems)


def defined_name(node):
    """The name that a top-level statement defines; None for other statements."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return None


def first_line(node, bare_lines, banner):
    """The first line of a block, which begins with its comments and decorators."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in [node, *decorators]) - 1
    while first - 1 > banner and bare_lines[first - 1].startswith(b"#"):
        first -= 1
    return first


def compare(sources):
    """{file: Source} -> what is wrong, one text for each problem."""
    report = []
    for file, source in sources.items():
        report += [f"{file}: {problem}" for problem in source.problems]
    for name in block_names(sources):
        report += misplaced(name, sources)
        groups = {}  # text of the block -> the files that have it
        for file, source in sources.items():
            if name in source.blocks:
                groups.setdefault(source.block(name), []).append(file)
        if len(groups) > 1:
            report.append(describe_difference(name, groups))
    return report


def block_names(sources):
    """Names of all plumbing blocks, each once, in the order of the files."""
    names = {}
    for source in sources.values():
        names |= dict.fromkeys(source.blocks)
    return list(names)


def misplaced(name, sources):
    """A list with one text if the block `name` is above the banner in some file, else empty."""
    above = [file for file, source in sources.items() if name in source.above]
    below = [file for file, source in sources.items() if name in source.blocks]
    if not above:
        return []
    return [f"{name} is above the banner in {', '.join(above)}, below it in {', '.join(below)}"]


def describe_difference(name, groups):
    """Say which files agree on a block, and show a diff between the two most common texts."""
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    text_a, files_a = ranked[0]
    text_b, files_b = ranked[1]
    diff = difflib.unified_diff(
        visible_lines(text_a), visible_lines(text_b), files_a[0], files_b[0], n=1, lineterm=""
    )
    diff = [f"    {line}" for line in diff]
    report = [f"{name} differs between"]
    report += [f"  {', '.join(files)}" for _, files in ranked]
    report += diff[:DIFF_LINES]
    if len(diff) > DIFF_LINES:
        report.append(f"    ... and {len(diff) - DIFF_LINES} more lines")
    return "\n".join(report)


def visible_lines(text):
    """Decoded lines in which carriage returns can be seen, as they may be the only difference."""
    return text.decode(errors="replace").replace("\r", "\\r").split("\n")


def copy_blocks(source, target):
    """The bytes of `target` with every block that `source` has too replaced by that text."""
    lines = list(target.lines)
    # Replace from the last block to the first, so that the line numbers of the others stay valid.
    for name, (first, last) in sorted(target.blocks.items(), key=lambda item: -item[1][0]):
        if name in source.blocks:
            lines[first:last] = [source.block(name)]
    return b"".join(lines)


def read(root):
    """{file name: Source} of the .py files in a folder."""
    sources = {path.name: parse(path.read_bytes()) for path in sorted(root.glob("*.py"))}
    if not sources:
        raise ValueError(f"{root} holds no .py file: pass the folder of the algorithms as --root")
    return sources


def write(path, root):
    """Copy the blocks of the file `path` into the other files of the folder `root`."""
    sources = read(root)
    if path.resolve().parent != root.resolve() or path.name not in sources:
        raise ValueError(
            f"--write {path} is not a file in {root}: pass one of {', '.join(sources)}"
        )
    broken = [
        f"{file}: {s.problems[0]}" for file, s in sources.items() if s.problems and not s.blocks
    ]
    if broken:
        raise ValueError(f"nothing was written, because a file has no blocks: {'; '.join(broken)}")
    for file, target in sources.items():
        text = copy_blocks(sources[path.name], target)
        if text != b"".join(target.lines):
            (root / file).write_bytes(text)
            print(f"{file}: copied the blocks of {path.name}")


def check(root):
    """Print what differs and how long each algorithm is; returns whether nothing is wrong."""
    sources = read(root)
    for file, source in sources.items():
        if source.banner is not None:
            print(f"{file}: {source.banner} lines up to the banner")
    report = compare(sources)
    if report:
        print("\n".join(report))
        return False
    count = len(block_names(sources))
    print(f"{len(sources)} files with {count} blocks: the same in every file that has them")
    return True


def main():
    """Check, or write and then check. Exit status 1: something differs; 2: bad input."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if args.check == (args.write is not None):
            raise ValueError("pass either --check or --write FILE")
        if args.write:
            write(args.write, args.root)
        identical = check(args.root)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not identical:
        sys.exit(1)


if __name__ == "__main__":
    main()

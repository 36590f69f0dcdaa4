"""Hold the plumbing of algos/*.py identical: the same block is the same text in every file that has it.

    python scripts/blocks.py --check                 say where they differ, and exit with 1 if they do
    python scripts/blocks.py --write algos/sac.py    carry the blocks of that file into the others

The plumbing is what stands between the two banner lines. A block is a def, a class or an assignment there, at the top
level and whole: with the decorators and the comments directly above it, to its last byte. Files need not have the same
blocks; --write never adds or removes one. --check also wants every line of the plumbing to belong to a block, since it
would go unguarded, and holds the files to their length.

What stands above it, from Args on, has a fingerprint, by which raw curves name the algorithm that made them
(scripts/plot.py --save).
"""

import ast
import difflib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

BEGIN = b"# ==== plumbing: the same text in every file ".ljust(120, b"=")
END = b"# ==== end of plumbing ".ljust(120, b"=")
MOST = {"outside": 340, "inside": 317}  # lines of a file, the two banners not counted
MOST_WITH_RANKS = {"outside": 467, "inside": 353}  # of a file with torch.distributed and both kinds of actions


@dataclass
class Args:
    """Hold the plumbing of algos/*.py identical: the same block is the same text in every file that has it."""

    check: bool = False  # say where the files differ, and exit with 1 if they do
    write: Path | None = None  # carry the blocks of this file into the others
    root: Path = Path(__file__).resolve().parent.parent / "algos"  # the folder of the files


def parse(text):
    """A file's bytes -> its lines, {name of a block: (first line, line after the last)}, and what is wrong with it."""
    lines = text.splitlines(keepends=True)
    bare = [line.rstrip(b"\r\n") for line in lines]
    begins, ends = ([i for i, line in enumerate(bare) if line == banner] for banner in (BEGIN, END))
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        found = f"{len(begins)} that begin it and {len(ends)} that end it"
        return lines, {}, [f"the plumbing needs two banners, in order and as in scripts/blocks.py; it has {found}"]
    begin, end = begins[0], ends[0]
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return lines, {}, [f"line {error.lineno}: {error.msg}"]

    blocks, problems, guarded = {}, [], set()
    for node in tree.body:
        if not begin < node.lineno - 1 < end:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        else:
            continue
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
        while first - 1 > begin and bare[first - 1].startswith(b"#"):
            first -= 1
        if name in blocks:
            problems.append(f"line {first + 1}: {name} stands twice in the plumbing")
        blocks[name] = first, node.end_lineno
        guarded |= {*range(first, node.end_lineno)}

    loose = [i + 1 for i in range(begin + 1, end) if bare[i].strip() and i not in guarded]
    if loose:
        problems.append(f"line {loose[0]}: what stands in the plumbing must belong to a def, a class or an assignment")
    inside = end - begin - 1
    counts = {"outside": len(lines) - inside - 2, "inside": inside}
    for where, most in (MOST_WITH_RANKS if "Follower" in blocks else MOST).items():
        if counts[where] > most:
            problems.append(f"{counts[where]} lines {where} of the plumbing; {most} are the most")
    return lines, blocks, problems


def fingerprint(text):
    """Eight hex digits of a file's algorithm: its flags and all up to the plumbing, less the words."""
    nodes = ast.parse(text[: text.index(BEGIN)]).body
    first = next(i for i, node in enumerate(nodes) if isinstance(node, ast.ClassDef) and node.name == "Args")

    def bare(node):
        """A syntax tree as nested lists, without docstrings and without what is empty, which depends on the version."""
        if isinstance(node, list):
            return [bare(item) for item in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
        return [type(node).__name__] + [[k, bare(v)] for k, v in ast.iter_fields(node) if v is not None and v != []]

    return hashlib.sha256(repr(bare(nodes[first:])).encode()).hexdigest()[:8]


def compare(files):
    """{file: what parse() made of it} -> what is wrong, one text for each problem."""
    report = [f"{name}: {problem}" for name, (_, _, problems) in files.items() for problem in problems]
    for block in dict.fromkeys(block for _, blocks, _ in files.values() for block in blocks):
        groups = {}
        for name, (lines, blocks, _) in files.items():
            if block in blocks:
                groups.setdefault(b"".join(lines[slice(*blocks[block])]), []).append(name)
        if len(groups) > 1:
            (one, names), (other, others) = sorted(groups.items(), key=lambda group: -len(group[1]))[:2]
            members = [f"  {', '.join(group)}" for group in sorted(groups.values(), key=len, reverse=True)]
            # A carriage return is made visible, since it may be all that differs.
            texts = [text.decode(errors="replace").replace("\r", "\\r").split("\n") for text in (one, other)]
            diff = [f"    {line}" for line in difflib.unified_diff(*texts, names[0], others[0], n=1, lineterm="")]
            more = [f"    ... and {len(diff) - 16} lines more"] if len(diff) > 16 else []
            report.append("\n".join([f"{block} differs between", *members, *diff[:16], *more]))
    return report


def carry(source, files):
    """{file: its bytes} with the blocks of `source` in place of those of the same name in each of the others."""
    lines, blocks, _ = files[source]
    carried = {}
    for name, (own_lines, own_blocks, _) in files.items():
        own_lines = [*own_lines]
        # From the last to the first, so that the line numbers of those still to come hold.
        for block, span in sorted(own_blocks.items(), key=lambda item: item[1], reverse=True):
            if block in blocks:
                own_lines[slice(*span)] = lines[slice(*blocks[block])]
        carried[name] = b"".join(own_lines)
    return carried


def main(args):
    """Check or write; what is wrong raises SystemExit."""
    if args.check == bool(args.write):
        sys.exit("error: give either --check or --write FILE")
    files = {path.name: parse(path.read_bytes()) for path in sorted(args.root.glob("*.py"))}
    if not files:
        sys.exit(f"error: {args.root} holds no .py file: give the folder of the algorithms as --root")

    if args.write:
        if args.write.resolve().parent != args.root.resolve() or args.write.name not in files:
            sys.exit(f"error: --write {args.write} is none of the files in {args.root}")
        if broken := [
            f"{name}: {problems[0]}" for name, (_, blocks, problems) in files.items() if problems and not blocks
        ]:
            sys.exit("\n".join(["error: nothing was written, because a file has no blocks", *broken]))
        for name, text in carry(args.write.name, files).items():
            if text != b"".join(files[name][0]):
                (args.root / name).write_bytes(text)
                print(f"{name}: carried the blocks of {args.write.name} over")
        files = {name: parse((args.root / name).read_bytes()) for name in files}

    if report := compare(files):
        print("\n".join(report))
        sys.exit(1)
    names = {block for _, blocks, _ in files.values() for block in blocks}
    print(f"{len(files)} files with {len(names)} blocks: the same in every file that has them")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except OSError as error:
        sys.exit(f"error: {error}")

"""`python -m lessons build` makes notebooks and a web page, `check NUMBER [FILE]` looks at what was written into a lesson's blanks,
`map` makes README.md's table anew."""

import argparse
import shlex
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lessons", description="Notebooks and a web page of the lessons; a check of what you wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="run the lessons; write notebooks and a web page of them")
    builder.add_argument("numbers", nargs="*", metavar="NUMBER", help="lessons, as 01 04; all of them by default")
    builder.add_argument("--out", type=Path, default=Path("build/lessons"), help="folder (%(default)s)")
    builder.add_argument("--model", default="tiny", help="which the lessons run on (%(default)s)")
    builder.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    builder.add_argument("--quick", action="store_true", help="less of everything: to see that it works")
    checker = commands.add_parser("check", help="say what is wrong with the blanks of a lesson")
    checker.add_argument("number", metavar="NUMBER", help="as 04")
    checker.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a script or notebook; the lesson itself by default")
    commands.add_parser("map", help="make the table of lessons/README.md anew")
    args = parser.parse_args()
    try:
        return {"build": build, "check": check, "map": write_map}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"lessons: {error}", file=sys.stderr)
        return 2


def build(args: argparse.Namespace) -> int:
    from lessons.pages import build_pages

    options = ["--model", args.model, "--device", args.device, *(["--quick"] if args.quick else [])]
    for path in build_pages(args.out, args.numbers, shlex.join(options)):
        print(path, flush=True)
    return 0


def check(args: argparse.Namespace) -> int:
    """0 if all blanks are right, 1 if one is not."""
    from lessons.catalogue import find
    from lessons.exercises import complaint, exercises, written_functions

    lesson = find(args.number)
    written = written_functions(args.file or lesson.path)
    wrong = 0
    for name in exercises(lesson.name):
        said = complaint(lesson.name, written[name]) if name in written else "not in the file; write a function of this name"
        wrong += said is not None
        print(f"{name}: {said or 'right'}")
    return 1 if wrong else 0


def write_map(args: argparse.Namespace) -> int:
    from lessons.catalogue import HERE, readme

    path = HERE / "README.md"
    path.write_text(readme(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

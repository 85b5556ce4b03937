"""`python -m lessons pages` renders the lessons as Markdown, `build` makes notebooks and a web page, `check NUMBER [FILE]` looks at what was
written into a lesson's blanks, `map` makes README.md's table and the pictures of the pipeline anew."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lessons", description="Markdown pages, notebooks and a web page of the lessons; a check of what you wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    renderer = commands.add_parser("pages", help="write lessons/pages and lessons/figures; run the lessons whose code or model has changed")
    builder = commands.add_parser("build", help="write notebooks and a web page; run the lessons whose code or model has changed")
    for command in (renderer, builder):
        command.add_argument("numbers", nargs="*", metavar="NUMBER", help="lessons, as 01 04; all of them by default")
        command.add_argument("--again", action="store_true", help="run even what has not changed")
        command.add_argument("--jobs", type=int, default=1, help="lessons that run side by side (%(default)s)")
        command.add_argument("--out", type=Path, default=Path("build/lessons"), help="folder of what is built (%(default)s)")
    builder.add_argument("--model", default="tiny", help="which the lessons run on (%(default)s)")
    builder.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    builder.add_argument("--quick", action="store_true", help="less of everything: to see that it works")
    checker = commands.add_parser("check", help="say what is wrong with the blanks of a lesson")
    checker.add_argument("number", metavar="NUMBER", help="as 04")
    checker.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a script or notebook; the lesson itself by default")
    commands.add_parser("map", help="make the table of lessons/README.md and the pictures of the pipeline anew")
    args = parser.parse_args()
    try:
        return {"pages": pages, "build": build, "check": check, "map": write_map}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"lessons: {error}", file=sys.stderr)
        return 2


def pages(args: argparse.Namespace) -> int:
    from lessons.catalogue import entries, find
    from lessons.rendered import write_pages

    chosen = [find(number) for number in args.numbers] or entries()
    return _report(write_pages(chosen, args.out, again=args.again, jobs=args.jobs), len(chosen))


def build(args: argparse.Namespace) -> int:
    from lessons.catalogue import entries
    from lessons.web import build_pages

    options = ["--model", args.model, "--device", args.device, *(["--quick"] if args.quick else [])]
    usual = (args.model, args.device, args.quick) == ("tiny", "auto", False)
    built = build_pages(args.out, args.numbers, "" if usual else shlex.join(options), again=args.again, jobs=args.jobs)
    return _report(built, len(args.numbers or entries()) + 1)


def _report(written: Iterator[tuple[Path, float | None]], total: int) -> int:
    for i, (path, seconds) in enumerate(written, start=1):
        print(f"[{i}/{total}] {path}" + (f", {seconds:.0f} s" if seconds is not None else ""), flush=True)
    return 0


def check(args: argparse.Namespace) -> int:
    """0 if all blanks are right, 1 if one is not."""
    from lessons.catalogue import find
    from lessons.exercises import complaint, exercises, written_functions

    lesson = find(args.number)
    written = written_functions(args.file or lesson.path)
    wrong, blanks = 0, exercises(lesson.name)
    for name in blanks:
        said = complaint(lesson.name, written[name]) if name in written else "not in the file; write a function of this name"
        wrong += said is not None
        print(f"{name}: {said or 'right'}")
        if said is None and blanks[name].number:
            print(f"  {blanks[name].number(written[name])}")
    return 1 if wrong else 0


def write_map(args: argparse.Namespace) -> int:
    from lessons.catalogue import HERE, readme
    from lessons.pipeline_map import PARTS, drawing

    path = HERE / "README.md"
    path.write_text(readme(path.read_text()))
    for part in PARTS:
        (HERE / "figures" / f"pipeline-{part}.svg").write_text(drawing(part))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs commands of the command line in this process, for the tests of it."""

import sys

from minidiff.cli.main import main


def runner(monkeypatch, tmp_path, capsys):
    """A function that runs a command in an empty folder, and gives its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minidiff", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command

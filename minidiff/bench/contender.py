"""A contender of a benchmark: a process that lives as long as the benchmark and does one thing at a time, when it is asked.

    here                                     there: python -m minidiff.bench.step '{"contender": ...}'
    Contender(module, job).ask(do="time") -> serve(prepare): prepare(job) once, then its answer to every request
                                         <-

Each has its own memory to be measured, its own settings, compiled code and CUDA context, and one that crashes takes no other with it. Only
one works at a time; the others wait for a line on their standard input. This file imports nothing but the standard library, so that a
contender's imports are its own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from time import perf_counter

POSIX = os.name == "posix"
TIMEOUT = 400  # seconds for one answer; compiling takes longest


class Refused(Exception):
    """A contender cannot do what it was asked, with the reason."""


class Contender(AbstractContextManager):
    """Another process: `with Contender(module, job) as one: one.ask(do="time")`. environment: variables that it has besides ours."""

    def __init__(self, module: str, job: dict, environment: dict[str, str] | None = None):
        self.command = [sys.executable, "-m", module, json.dumps(job)]
        self.environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (environment or {})
        self.start()

    def start(self) -> None:
        """Start the process, offline."""
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=os.environ | self.environment,
            process_group=0 if POSIX else None,  # so that what it starts itself, as workers that compile or draw, ends with it
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Kill the process, and those that it started."""
        self.kill()
        self.process.wait()
        for stream in (self.requests, self.answers, self.stderr):
            with suppress(BrokenPipeError):  # what it did not read any more
                stream.close()

    def kill(self) -> None:
        """Kill its process group, or where there are none, the process."""
        with suppress(ProcessLookupError):
            if POSIX:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def restart_if_dead(self) -> None:
        """Start the process anew if it died."""
        if self.process.poll() is not None:
            self.close()
            self.start()

    def ask(self, limit: float = TIMEOUT, **request: object) -> dict:
        """Return the answer. Raises Refused with the contender's reason, with its last line if it died, or after `limit` seconds."""
        timer = threading.Timer(limit, self.kill)
        began = perf_counter()
        timer.start()
        try:
            print(json.dumps(request), file=self.requests, flush=True)
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.process.wait()
            if perf_counter() - began >= limit:
                raise Refused(f"no answer within {limit:.0f} s")
            self.stderr.seek(0)
            words = [words for words in self.stderr.read().splitlines() if words.strip()]
            raise Refused(f"died with code {self.process.returncode}: {words[-1] if words else 'without a word'}")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer


def serve(prepare: Callable[[dict], Callable[[dict], dict]]) -> None:
    """Answer requests, one line of JSON each, until there are no more: the contender's side. All other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handle = None
    for line in sys.stdin:
        try:
            handle = handle or prepare(json.loads(sys.argv[1]))
            answer = handle(json.loads(line))
        except Exception as error:  # the reason is what is asked for
            traceback.print_exc()
            answer = {"refused": format_error(error)}
        print(json.dumps(answer), file=answers, flush=True)
        if "CUDA error" in answer.get("refused", ""):
            sys.exit(1)  # nothing that this process does on the GPU works any more


def format_error(error: Exception) -> str:
    """Format an error as its type and first line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")[:300]

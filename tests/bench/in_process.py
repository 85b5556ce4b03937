"""A contender that works in this process, so that tests of whole benchmarks need not start ten processes that import PyTorch each."""

from importlib import import_module

from minidiff.bench.contender import Contender, Refused, format_error


class InProcess(Contender):
    """Asks the module's `prepare` as `serve` would; `asked` has all (module, request)."""

    asked: list[tuple[str, dict]] = []

    def __init__(self, module, job, environment=None):
        self.module, self.job, self.handle = module, job, None

    def ask(self, limit=1.0, **request):
        InProcess.asked.append((self.module, request))
        assert limit > 0
        try:
            self.handle = self.handle or import_module(self.module).prepare(self.job)
            return self.handle(request)
        except Exception as error:
            raise Refused(format_error(error)) from error

    def restart_if_dead(self):
        pass

    def close(self):
        self.handle = None

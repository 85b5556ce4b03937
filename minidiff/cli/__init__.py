"""The command line: main.py has its commands."""

import os

# Threads that wait turn in a loop so many times, then sleep. GNU OpenMP's default is to turn on and on: where a second program wants one of
# two cores, a step of the bundled model then takes 100 times as long. This is read when torch is imported, so nothing above may import it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Also read then. DistributedDataParallel looks for weights that a loss did not reach (see trainers/engine/distributed.py); where there are
# none, as with most methods, every process would warn of that in C++, past Python's standard error.
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

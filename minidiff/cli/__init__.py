"""The command line: main.py has its commands."""

import os

# Threads that wait turn in a loop so many times, then sleep. GNU OpenMP's default is to turn on and on: where a second program wants one of
# two cores, a step of the bundled model then takes 100 times as long. This is read when torch is imported, so nothing above may import it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

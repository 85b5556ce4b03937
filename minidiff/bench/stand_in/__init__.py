"""A stand-in for open_clip's tokenizer, so that benchmarks run where open_clip is not installed.

Benchmarks time models of random weights, for which any tokens do. The stand-in knows byte-pair encoding and the merges that it is given; of
CLIP's own merges it has no copy and spells words letter by letter.
"""

import importlib.util
import os
import sys
from pathlib import Path


def provide_open_clip() -> None:
    """Put the stand-in where `import open_clip` finds it, in this process and those that it starts, unless open_clip is installed."""
    if importlib.util.find_spec("open_clip") is None:
        place = str(Path(__file__).parent)
        sys.path.append(place)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (os.environ.get("PYTHONPATH"), place) if path)
        importlib.invalidate_caches()

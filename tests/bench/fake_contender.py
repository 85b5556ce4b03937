"""A contender for the tests of the benchmarks' machinery: does what its job says. Started as `python -m tests.bench.fake_contender`."""

import os
import sys
import time

import numpy as np

from minidiff.bench.contender import serve


def prepare(job):
    if job.get("refuses"):
        raise ValueError(job["refuses"] + "\nand a second line")
    print("said on standard output, which is not for the other side")

    def answer(request):
        if request["do"] == "die":
            print("last words", file=sys.stderr)
            os._exit(3)
        if request["do"] == "sleep":
            time.sleep(60)
        if request["do"] == "check":
            np.save(request["result"], np.float32(job["result"]))
            return {"memory": job["memory"]}
        if job.get("fails"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"seconds": job["seconds"] * request["repeats"]}

    return answer


if __name__ == "__main__":
    serve(prepare)

"""A contender's process: it answers, refuses, dies and is late, and nobody else is hurt."""

import numpy as np
import pytest

from minidiff.bench.contender import Contender, Refused, format_error

FAKE = "tests.bench.fake_contender"


def test_a_contender_answers_and_what_it_prints_is_not_taken_for_an_answer(tmp_path):
    path = tmp_path / "result.npy"
    with Contender(FAKE, {"result": [1.0, 2.0], "memory": 5, "seconds": 0.5}) as one:
        assert one.ask(do="check", result=str(path)) == {"memory": 5}
        assert one.ask(do="time", repeats=3) == {"seconds": 1.5}
        assert np.load(path).tolist() == [1.0, 2.0]
        with pytest.raises(Refused, match="no answer within 0 s"):
            one.ask(limit=0.2, do="sleep")
        one.restart_if_dead()
        assert one.ask(do="time", repeats=2) == {"seconds": 1.0}
        with pytest.raises(Refused, match="died with code 3: last words"):
            one.ask(do="die")
        with pytest.raises(Refused, match="died with code 3"):
            one.ask(do="time", repeats=1)  # it stays dead until it is revived
    assert one.process.returncode is not None


def test_a_reason_is_its_first_line_and_a_process_whose_gpu_is_lost_ends():
    with Contender(FAKE, {"refuses": "head dim 41 is not a multiple of 8"}) as one:
        with pytest.raises(Refused, match="^ValueError: head dim 41 is not a multiple of 8$"):
            one.ask(do="time", repeats=1)
    with Contender(FAKE, {"fails": True}) as one:
        with pytest.raises(Refused, match="illegal memory access"):
            one.ask(do="time", repeats=1)
        assert one.process.wait(10) == 1
    assert format_error(RuntimeError()) == "RuntimeError"

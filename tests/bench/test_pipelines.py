"""Which contenders the benchmarks of whole models have."""

from minidiff.bench import pipelines


def test_the_contenders_of_a_gpu_are_all_ways_of_diffusers_and_ours(monkeypatch):
    jobs = pipelines.make_model_jobs("cuda", against=True, max_autotune=True)
    assert [name for name in jobs if name.startswith("diffusers")] == [
        "diffusers",
        "diffusers channels-last",
        "diffusers compiled",
        "diffusers max-autotune",
    ]
    assert next(iter(jobs)) == "diffusers" and [name for name, job in jobs.items() if job["untimed"]] == ["minidiff float32"]
    assert not any("diffusers" in name for name in pipelines.make_model_jobs("cuda", against=False))
    assert next(iter(pipelines.make_model_jobs("cpu", against=True))) == "diffusers float32"

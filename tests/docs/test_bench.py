"""The benchmarks run. `make bench` runs all of them; here one shows that servers, workers and reports work."""

from __future__ import annotations

import json

from bench.__main__ import run
from bench.stage import Stage
from worker.output import console


def test_a_benchmark_runs_to_its_end_and_its_figures_are_json(servers, broker_url, tmp_path):
    with Stage.using(servers.database_url, broker_url, tmp_path) as stage:
        (report,) = run(stage, ["throughput"], 0.002, console(), only=["naive", "1"])

    found = json.loads(json.dumps(report.as_json()))

    assert found["name"] == "throughput"
    assert found["targets"][0]["sentence"] == "1 process × naive"
    assert len(found["figures"]) == 2

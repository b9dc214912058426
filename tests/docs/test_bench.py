"""Each benchmark works; what it measures is no business of a test's."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import BENCHMARKS, run
from bench.stage import Stage
from worker.output import console


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_to_its_end_and_its_figures_are_json(servers, broker_url, tmp_path, name):
    with Stage.on(servers.database_url, broker_url, tmp_path) as stage:
        (report,) = run(stage, [name], 0.002, console())

    found = json.loads(json.dumps(report.as_json()))

    assert found["name"] == name
    assert found["tables"]
    assert found["figures"]

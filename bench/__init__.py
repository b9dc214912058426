"""Benchmarks, always beside an alternative on the same servers in the same run. `make bench` runs them.

    __main__.py    the command line
    stage.py       durable servers, a database for each run, workers, waiting until all events are applied
    workload.py    the events
    report.py      medians, ratios, tables, targets
    engine.py      the ledger's engine beside raw COPY of the same rows
    plans.py       how the look-up finds its rows, with and without statistics
    throughput.py  workers beside naive.py
    naive.py       a plain Celery worker, one task and one transaction for each event
    latency.py     one event at a time
    lanes.py       several processes while each transaction is slow
    memory.py      one worker over many events; runs only by name

Only ratios within one run mean something, because the machine's speed varies.
"""

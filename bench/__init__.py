"""How fast it is, beside what else one could do on the same servers in the same run. `make bench` runs it.

    __main__.py    the command: which benchmarks, how long, where the figures go
    stage.py       durable servers, a database a run, workers, and the moment when all is committed and acknowledged
    workload.py    the events
    report.py      medians, ratios, tables, targets
    engine.py      the ledger's engine beside raw COPY of the same rows
    plans.py       how the look-up finds its rows, with and without statistics
    throughput.py  workers beside naive.py
    naive.py       the worker that most people would write
    latency.py     one event at a time
    lanes.py       several processes while each transaction is slow
    memory.py      one worker over many events; not part of `make bench`, ask for it by name

Only ratios within one run mean something: the machine is whatever it is, and not alone.
"""

"""Faults on real processes, again and again: workers killed and frozen, servers crashed and full, connections cut.

    books.py    what is published, and what must have become of it: one outcome per key, every balance
    ground.py   servers to break, and the judgement: drained, each key decided once, every invariant
    workers.py  real Celery workers to kill, freeze and stop
    entry.py    what such a worker runs: Celery, after a word to go, and poisoned where a test asks for it

`make test` runs a short form of each, `make chaos` (TOKENTRAIL_CHAOS=long) the long one. The seed is printed, and taken
from TOKENTRAIL_CHAOS_SEED: the same events in the same order; when a signal arrives is the machine's to say.
"""

"""Faults on real processes: workers killed and frozen, servers crashed, full and unavailable, connections cut.

    books.py    what a test publishes, and the expected outcome of each key and balance of each account
    ground.py   servers that a test may break, and the verdict: each key decided once, every invariant holds

`make test` runs a short form of each test, `make chaos` (TOKENTRAIL_CHAOS=long) the long one. The seed is printed, and
read from TOKENTRAIL_CHAOS_SEED: it determines the events and their order, not when signals arrive.
"""

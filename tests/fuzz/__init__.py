"""Hostile messages through a real worker.

    hostile.py                the messages: known killers, and what hypothesis and random changes of bytes generate
    expected.py               the expected outcome of each message
    test_hostile_messages.py  Redis, a worker, PostgreSQL, the worker's memory and its log

`make test` runs a short form, `make fuzz` (TOKENTRAIL_FUZZ=long) the long one. Each run prints its seed;
TOKENTRAIL_FUZZ_SEED repeats a run, with the same messages in the same order.
"""

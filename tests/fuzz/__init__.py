"""Messages that nobody would send, through a real worker.

    hostile.py                what is sent: known killers, and what hypothesis and a byte-wise mutation make of them
    accounts.py               what must have become of each message
    test_hostile_messages.py  the whole way: Redis, a worker, PostgreSQL, its memory and its log

`make test` runs a short form, `make fuzz` (TOKENTRAIL_FUZZ=long) the long one. The seed is printed, and taken from
TOKENTRAIL_FUZZ_SEED: the same messages in the same order.
"""

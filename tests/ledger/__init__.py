"""What happens to the money, on a real PostgreSQL and without Redis.

support.py  short ways to make events, settle them, and look at what is left behind
frozen.py   a worker's ledger as a process of its own, to be frozen
"""

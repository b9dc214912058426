"""Messages on the queue to outcomes: a batcher in process, and whole workers.

in_process.py  a Batcher without Celery, moved turn by turn
"""

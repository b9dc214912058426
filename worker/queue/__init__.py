"""Celery's consumer ↔ the ledger. Read in this order:

consumer.py       the one handler through which every message comes
undeliverable.py  which messages become dead letters before they are read
parsing.py        from a message to deliveries: what a producer may call
intake.py         a message in flight: what Celery and Flower hear of it, from its arrival to its acknowledgement
batcher.py        messages in flight into batches, and what became of each
waiting.py        which events wait, for tokens or for a lock, and when to poll for them
patience.py       where they wait
control.py        what operators tell a running worker
replay.py         dead letters back onto the queue
"""

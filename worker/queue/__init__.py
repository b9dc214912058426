"""Celery's consumer ↔ the ledger. Read in this order:

consumer.py   all hooks into Celery: every message reaches the batcher
intake.py     messages in and out: reading, acknowledging, task events for Flower
parsing.py    from a message to deliveries and dead letters
in_flight.py  a message in flight, and the parts of it that go into batches
batcher.py    parts into batches for the ledger, outcomes back
parking.py    which events are parked, for a balance or a row lock, and when to poll for them
broker.py     what the consumer asks of kombu's channels
wakeup.py     waking the event loop from the ledger thread
replay.py     dead letters back into the queue
"""

"""From Redis to a batch. Read in this order:

transport.py      kombu's Redis transport, popping and recording in one step; its parts are
                  fetching, unacked, polling, owed, envelope, scripts and lua/
consumer.py       the one door through which every message comes
undeliverable.py  which messages become dead letters before they are read
tasks.py          from a message to deliveries: what a producer may call
intake.py         a message in hand: what Celery and Flower hear of it, from its arrival to its acknowledgement
batching.py       what is in hand into batches, and what became of each
waiting.py        what of it waits, for tokens or for a lock, and when to look whether it still must
patience.py       the rooms that it waits in
control.py        what operators tell a running worker
replay.py         dead letters back onto the queue
"""

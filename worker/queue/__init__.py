"""From Redis to a batch. Read in this order:

transport.py      kombu's Redis transport, popping and recording in one step (with envelope, fetching, scripts, …)
consumer.py       the one door through which every message comes
undeliverable.py  which messages become dead letters before they are read
tasks.py          from a message to deliveries: what a producer may call
batching.py       deliveries into batches, outcomes into acknowledgements and events
patience.py       burns that may be ahead of their accrual
replay.py         dead letters back onto the queue
"""

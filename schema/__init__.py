"""The shape of the data: what producers send, what tables hold, what the API answers.

    canonical.py  JSON as one exact text, numbers as Decimal
    events.py     accruals and burns, and the rules of their fields
    messages.py   the wire contract: task names, headers, limits, the text of a Celery message
    publisher.py  how a Python producer sends events
    broker.py     a Redis client for the broker's URL
    urls.py       the rules of a broker's URL, and URLs without their secrets
    text.py       hostile text made fit for one line
    reasons.py    the closed lists of reasons why an event is not applied
    tables.py     what PostgreSQL holds, constraints included
    responses.py  what the API answers

Modules import each other relatively and never the worker, so that client/ can copy publisher.py, and what it
imports, into a small package for producers.
"""

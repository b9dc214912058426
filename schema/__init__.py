"""The shape of the data: what producers send, what tables hold, what the API answers.

    canonical.py  JSON as one exact text, numbers as Decimal
    events.py     accruals and burns: what a producer may say
    messages.py   the wire contract: task names, headers, limits
    text.py       hostile text made fit for one line
    reasons.py    the closed lists of why an event was not applied
    tables.py     what PostgreSQL holds, constraints included
    responses.py  what the read endpoint answers
    publisher.py  how a Python producer sends events
    urls.py       whether an address of a server can be read; how it is shown without its secrets

Imports inside are relative and nothing here imports the worker, so that client/ can make of
publisher.py, and what it imports, a small package for producers.
"""

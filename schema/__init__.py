"""The shape of the data: what producers send, what tables hold, what the API answers.

    canonical.py  JSON as one exact text, numbers as Decimal
    events.py     accruals and burns: what a producer may say
    reasons.py    the closed lists of why an event was not applied
    tables.py     what PostgreSQL holds, constraints included
    answers.py    what the read endpoint answers
    publisher.py  how a Python producer sends events

Imports inside are relative and nothing here imports the worker, so that events.py and
publisher.py can also be built as a small package for producers.
"""

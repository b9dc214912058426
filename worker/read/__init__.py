"""Answers: what PostgreSQL holds, over HTTP and on the command line.

api.py         the read endpoint: which address answers what
history.py     an account's records, page by page
rejections.py  what an account was refused for good, likewise
receipts.py    what became of an event
supply.py      how many tokens there are
problems.py    every "no" of the endpoint, as a sentence
edge.py        what all its answers have in common
database.py    PostgreSQL as the endpoint uses it: within a bound or not at all
"""

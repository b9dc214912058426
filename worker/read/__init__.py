"""The read side: what PostgreSQL holds, over HTTP and on the command line.

api.py         the HTTP API: its endpoints and its server
pages.py       an account's records and its rejections, page by page
receipts.py    what became of an event
supply.py      how many tokens there are
health.py      /healthz and /readyz
problems.py    every error response of the API, as a sentence
middleware.py  what all responses have in common
connection.py  connections for readers, and a single read with one of its own
database.py    the API's pool of connections, each read in bounded time
"""

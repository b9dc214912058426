"""What tests share.

brokers.py             servers of a test's own, queues, waiting
stage.py               a database, a broker and real workers of a test's own
producer.py            another Python project, which has installed the client
proxy.py               a TCP proxy to cut, stall and half-open connections
catalog.py             what PostgreSQL's catalog says of a schema
logs.py                what was logged
with_given_servers.py  runs a command with DATABASE_URL and BROKER_URL of servers that it did not start
"""

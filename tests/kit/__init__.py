"""What tests share.

events.py              the events that tests publish and apply
wait.py                eventually(): waiting for other processes and threads
cli.py                 the command line, in this process or in one of its own
stage.py               a database, a broker and real workers of a test's own
workers.py             Celery workers that start fast, to be killed, frozen and stopped
worker_process.py      what such a worker runs
servers.py             Redis, Sentinel, certificates of a test's own, to be broken
proxy.py               a TCP proxy to cut, stall and half-open connections
messages.py            messages as they lie on Redis lists
consumer.py            a kombu consumer without Celery
http.py                requests to servers on loopback
producer.py            another Python project, which has installed the client
catalog.py             what PostgreSQL's catalog says of a schema
logs.py                what was logged
with_external_servers.py  runs a command with DATABASE_URL and BROKER_URL of servers that it did not start
"""

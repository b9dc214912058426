"""A process that consumes `tokens` and notes each message in the set `done` before acknowledging it: to be killed.

Arguments: URL, transport, visibility timeout. Ends on SIGTERM.
"""

import signal
import sys

import kombu
import redis

from tests.kit.brokers import queue_of

URL, TRANSPORT, TIMEOUT = sys.argv[1:]
OPTIONS = {
    "visibility_timeout": float(TIMEOUT),
    "unacked_restore_interval": 0.2,
    "unacked_restore_throttle": 1,
    "socket_timeout": 5,
}
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
done = redis.Redis.from_url(URL)


def apply(message):
    done.sadd("done", message.headers["number"])
    message.ack()


while not stopping:
    try:
        with kombu.Connection(URL, transport=TRANSPORT, transport_options=OPTIONS) as connection:
            channel = connection.channel()
            channel.basic_qos(0, 100, False)
            with kombu.Consumer(channel, [queue_of("tokens")], on_message=apply, accept=["json"]):
                print("consuming", flush=True)
                while not stopping:
                    try:
                        connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue
    except connection.connection_errors:
        continue

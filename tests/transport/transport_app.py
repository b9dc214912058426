"""A Celery application as plain as can be, whose workers use our transport: Celery's side of it, without the ledger."""

import os
import time

import redis
from celery import Celery
from celery.signals import celeryd_init

from worker.transport import channel as transport

URL = os.environ["TRANSPORT_APP_URL"]

app = Celery("transport_app", broker=URL)
app.conf.update(
    task_default_queue="tokens",
    task_acks_late=True,
    task_ignore_result=True,
    task_send_sent_event=False,
    worker_send_task_events=True,
    worker_prefetch_multiplier=50,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    broker_transport_options={"visibility_timeout": 5, "unacked_restore_interval": 1, "socket_timeout": 5},
)


@celeryd_init.connect
def use_our_transport(**_):
    transport.register()


@app.task
def note(number):
    """Like a commit: over only once it is durable."""
    while True:
        try:
            with redis.Redis.from_url(URL) as client:
                client.sadd("done", number)
                return
        except redis.ConnectionError:
            time.sleep(0.1)

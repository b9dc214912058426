"""Celery's settings, and nothing else; what they rest on is in ARCHITECTURE.md. `worker/app.py` adds the addresses."""

# An acknowledgement means: the outcome is durable in PostgreSQL.
task_acks_late = True
# A worker that dies has decided nothing: its messages come back.
task_reject_on_worker_lost = True
# False would delete the message of a failed task on Redis; ours are dead letters in PostgreSQL by then.
task_acks_on_failure = True
# A time limit says nothing about the event: deliver it again.
task_acks_on_timeout = False
# PostgreSQL holds the result; a result backend would cost a round trip an event.
task_ignore_result = True
# A default queue is published to the exchange '', which needs no binding table that a flush could lose.
task_default_queue = "tokens"
# Pickle and yaml are never loaded, whoever sends them.
accept_content = ["json"]
task_serializer = "json"

# Everybody reads one clock.
timezone = "UTC"
enable_utc = True

# Messages in hand beyond the batch being committed; the Batcher raises it where two batches are more.
worker_prefetch_multiplier = 1000
# Tasks are applied by one ledger thread a process; scale with processes (`tokentrail worker --processes`).
worker_pool = "threads"
worker_concurrency = 1
# One door for every message, so that none is dropped: see worker/queue/consumer.py.
worker_consumer = "worker.queue.consumer:Consumer"

# Flower lives on task events.
worker_send_task_events = True
# The producer's copy of what the worker's task-received says anyway.
task_send_sent_event = False
# "started" would be stored in the result backend that we do not have; the event is sent all the same.
task_track_started = False

# Redis may be away for as long as it likes.
broker_connection_retry_on_startup = True
broker_connection_retry = True
broker_connection_max_retries = None
# Redis at maxmemory answers with errors: the worker stays and drains it.
broker_channel_error_retry = True
# Let the commit finish when the connection to Redis is lost; a second delivery gets the first answer.
worker_cancel_long_running_tasks_on_connection_loss = False
# What SIGQUIT leaves a batch before the process goes, in seconds.
worker_soft_shutdown_timeout = 20
# We log what happens in our own words.
worker_hijack_root_logger = False
worker_redirect_stdouts = False
# No remote command stops or changes a ledger worker for ever; inspect and shutdown work.
worker_enable_remote_control = True

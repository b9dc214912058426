"""Celery's settings, and nothing else; ARCHITECTURE.md has the reasons behind them. `worker/app.py` adds what depends
on tokentrail's own settings: URLs, the queue, prefetch.
"""

# An acknowledgement means that the outcome is durable in PostgreSQL.
task_acks_late = True
# A worker that died has applied nothing: its messages are delivered again.
task_reject_on_worker_lost = True
# False would delete the message of a failed task from Redis; ours are dead letters in PostgreSQL by then.
task_acks_on_failure = True
# A time limit says nothing about the event: deliver it again.
task_acks_on_timeout = False
# PostgreSQL stores the outcome; a result backend would cost one more round trip for each event.
task_ignore_result = True
# kombu publishes to the default queue through exchange '', which needs no binding that a flush of Redis could lose.
task_default_queue = "tokens"
# Pickle and YAML are never loaded, from any sender.
accept_content = ["json"]
task_serializer = "json"

timezone = "UTC"
enable_utc = True

# One ledger thread applies the batches of a process; scale with processes (`tokentrail worker --processes`).
worker_pool = "threads"
worker_concurrency = 1
# Every message reaches the batcher, and none is dropped; that module has all other hooks too.
worker_consumer = "worker.queue.consumer:Consumer"

# Flower shows task events.
worker_send_task_events = True
# The producer's copy of what the worker's task-received says.
task_send_sent_event = False
# "started" would be stored in the result backend, which does not exist; the event is sent all the same.
task_track_started = False

# Redis may be unreachable for any length of time.
broker_connection_retry_on_startup = True
broker_connection_retry = True
broker_connection_max_retries = None
# Redis at maxmemory answers with errors: the worker stays and drains it.
broker_channel_error_retry = True
# Let the commit finish when the connection to Redis is lost; the second delivery gets the first outcome.
worker_cancel_long_running_tasks_on_connection_loss = False
# Seconds that SIGQUIT leaves a batch before the process exits.
worker_soft_shutdown_timeout = 20
# worker/log.py configures logging.
worker_hijack_root_logger = False
worker_redirect_stdouts = False
# For `celery inspect` and `celery control shutdown`; no command changes for ever what a worker does with events.
worker_enable_remote_control = True

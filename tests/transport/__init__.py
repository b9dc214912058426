"""Tests of worker/transport/, in process: a kombu consumer without Celery on a real Redis. tests/chaos/ kills workers.

broker.py                    what these tests do to lists and records in Redis
test_fetch.py                order, limits, priorities, pause
test_undecodable.py          bytes that are not a message, and broadcasts that are not
test_acknowledge.py          acknowledgements, requeues, prefetch
test_restore.py              heartbeats, restores and their counts, solo attempts
test_beside_kombu.py         the same queue with kombu's own transport; registration
test_outages.py              Redis that crashes, is full, refuses, forgets; TLS; Sentinel
test_contract.py             every private member of kombu that the transport relies on
test_kombu_suite.py          kombu's own tests; kombu_suite_plugin.py replaces its transport by ours
"""

"""Tests of worker/transport/.

consume.py             a process that consumes, to be killed
transport_app.py       a plain Celery application on our transport
kombu_suite_plugin.py  puts our transport where kombu's own tests look for kombu's
"""

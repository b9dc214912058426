"""Workers that are asked to stop: each finishes its batch and requeues all other messages at once."""

from __future__ import annotations

import signal
import time

import pytest

from tests.kit.wait import eventually

from .ground import sized

#: Seconds in which a worker must have stopped. It takes one second on an idle machine; it must not wait for PostgreSQL
#: or for the visibility timeout.
STOP_SECONDS = 20

SIGNALS = pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGQUIT], ids=["SIGTERM", "SIGQUIT"])


@SIGNALS
def test_a_stop_under_load_finishes_the_batch_and_requeues_the_rest(ground, books, sign):
    ground.open(books)
    worker = ground.work(batch_size=50, visibility_timeout=3600)
    for _ in range(sized(1, 10)):
        decided = ground.decided()
        ground.publish(books.messages_for(3000))
        eventually(lambda: ground.decided() > decided)  # noqa: B023
        status = worker.stop(sign, STOP_SECONDS)
        assert ground.in_flight() == 0, "messages are neither acknowledged nor requeued"
        print(f"{sign.name}: ended with {status}, {ground.queued()} messages in the queue")
        assert status == 0
        worker = ground.work(visibility_timeout=3600)
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} under load")


def test_a_sigquit_between_an_outcome_and_its_acknowledgement_does_not_deadlock(ground, books):
    """Celery's handler waits for active tasks in the thread that ends them, and fails when they do not end."""
    ground.open(books)
    worker = ground.start(quit_at="task-started", visibility_timeout=3600).ready()
    ground.publish(books.messages_for(200))
    worker.process.join(15)  # less than the soft shutdown, which a deadlock would wait for
    assert worker.process.exitcode == 0, worker.log_end()
    assert worker.logged("Traceback") == 0, worker.log_end()
    assert ground.in_flight() == 0, "messages are neither acknowledged nor requeued"
    ground.work()
    ground.drain(books).assert_nothing_lost("a SIGQUIT in the middle of an answer")


@SIGNALS
def test_a_stop_while_postgresql_is_unavailable_requeues_everything_uncounted(ground, books, sign):
    """However often that happens, no message becomes a suspect."""
    ground.open(books)
    queued = books.messages_for(20)
    ground.publish(queued)
    with ground.redis() as client:
        first = client.lrange("tokens", 0, -1)
    ground.postgres.stop("immediate")
    stops = sized(2, 8)
    for _ in range(stops):
        worker = ground.work(visibility_timeout=3600)
        eventually(lambda: worker.logged("database not available") == 1)  # noqa: B023
        assert ground.in_flight() == len(queued)
        assert worker.stop(sign, STOP_SECONDS) == 0
        with ground.redis() as client:
            assert client.lrange("tokens", 0, -1) == first, "all messages are back in their old order"
            assert client.exists("unacked", "unacked_index", "unacked_restores") == 0
    ground.postgres.start()
    ground.work()
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} {stops} times without a database")


@SIGNALS
def test_a_stop_while_redis_is_unavailable_ends_the_worker_and_loses_nothing(ground, books, sign):
    ground.open(books)
    ground.publish(books.messages_for(500))
    ground.postgres.stop("immediate")
    worker = ground.work()
    eventually(lambda: ground.in_flight() > 0)
    ground.valkey.kill()
    time.sleep(0.5)
    worker.stop(sign, STOP_SECONDS)
    ground.valkey.start()
    ground.postgres.start()
    ground.work()
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} without either server")


def test_a_stop_requeues_parked_burns_and_never_rejects_them(ground, books):
    ground.open(books)
    accrual, burn = books.pair()
    ground.publish([burn])
    for _ in range(sized(2, 8)):
        worker = ground.work(burn_patience=60, visibility_timeout=3600)
        eventually(lambda: ground.in_flight() == 1)
        time.sleep(0.5)  # by then it has seen the balance, and is parked
        assert worker.stop(seconds=STOP_SECONDS) == 0
        assert (ground.queued(), ground.in_flight()) == (1, 0)
    ground.publish([accrual])
    ground.work()
    books.messages += 2
    ground.drain(books).assert_nothing_lost("a parked burn requeued")

"""Workers that are asked to end: the batch in hand is finished, everything else is put back at once."""

from __future__ import annotations

import signal
import time

import pytest

from tests.kit.wait import eventually

from .ground import sized

#: Seconds in which a worker has to be gone when it is asked to, on a machine that has much else to do. With nothing
#: in its way it takes one; what it must not do is wait for a database, or for the visibility timeout.
SOON = 20

SIGNALS = pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGQUIT], ids=["SIGTERM", "SIGQUIT"])


@SIGNALS
def test_a_stop_under_load_finishes_the_batch_and_puts_the_rest_back(ground, books, sign):
    ground.open(books)
    worker = ground.work(batch_size=50, visibility_timeout=3600)
    for _ in range(sized(1, 10)):
        decided = ground.decided()
        ground.publish(books.messages_for(3000))
        eventually(lambda: ground.decided() > decided)  # noqa: B023
        status = worker.stop(sign, SOON)
        assert ground.held() == 0, "what it had in hand is neither acknowledged nor put back"
        print(f"{sign.name}: ended with {status}, {ground.queued()} messages in the queue")
        assert status == 0
        worker = ground.work(visibility_timeout=3600)
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} under load")


def test_a_sigquit_between_an_outcome_and_its_answer_does_not_wait_for_itself(ground, books):
    """Celery's handler waits for active tasks in the very thread that would end them, and fails when it cannot."""
    ground.open(books)
    worker = ground.start(quit_at="task-started", visibility_timeout=3600).ready()
    ground.publish(books.messages_for(200))
    worker.process.join(15)  # less than the soft shutdown, which it would sleep through
    assert worker.process.exitcode == 0, worker.log_end()
    assert worker.logged("Traceback") == 0, worker.log_end()
    assert ground.held() == 0, "what it had in hand is neither acknowledged nor put back"
    ground.work()
    ground.drain(books).assert_nothing_lost("a SIGQUIT in the middle of an answer")


@SIGNALS
def test_a_stop_while_postgresql_is_away_puts_everything_back_uncounted(ground, books, sign):
    """Also out of waiting for the database; and however often that happens, no message is blamed for it."""
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
        assert ground.held() == len(queued)
        assert worker.stop(sign, SOON) == 0
        with ground.redis() as client:
            assert client.lrange("tokens", 0, -1) == first, "all of it is back, in its old order"
            assert client.exists("unacked", "unacked_index", "unacked_restores") == 0
    ground.postgres.start()
    ground.work()
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} {stops} times without a database")


@SIGNALS
def test_a_stop_while_redis_is_away_ends_the_worker_and_loses_nothing(ground, books, sign):
    ground.open(books)
    ground.publish(books.messages_for(500))
    ground.postgres.stop("immediate")
    worker = ground.work()
    eventually(lambda: ground.held() > 0)
    ground.valkey.kill()
    time.sleep(0.5)
    worker.stop(sign, SOON)
    ground.valkey.start()
    ground.postgres.start()
    ground.work()
    ground.drain(books).assert_nothing_lost(f"stopped by {sign.name} with neither server there")


def test_waiting_burns_are_put_back_by_a_stop_and_never_rejected(ground, books):
    ground.open(books)
    accrual, burn = books.pair()
    ground.publish([burn])
    for _ in range(sized(2, 8)):
        worker = ground.work(burn_patience=60, visibility_timeout=3600)
        eventually(lambda: ground.held() == 1)
        time.sleep(0.5)  # it has met too small a balance by then
        assert worker.stop(seconds=SOON) == 0
        assert (ground.queued(), ground.held()) == (1, 0)
    ground.publish([accrual])
    ground.work()
    books.messages += 2
    ground.drain(books).assert_nothing_lost("a waiting burn put back")

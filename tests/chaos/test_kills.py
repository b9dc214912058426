"""Workers that are killed, frozen and replaced: no event is lost, and none is decided twice."""

from __future__ import annotations

import time

import pytest

from tests.kit.wait import eventually

from .ground import LONG, VISIBILITY_TIMEOUT, Stream, sized

#: Kills and messages of one run.
KILLS, MESSAGES = sized(4, 40), sized(1_600, 20_000)

#: Seconds to apply the messages that are left: suspects are applied one by one.
DRAIN_SECONDS = sized(120, 400)

#: At most so many seconds from the arrival of messages to the kill: about what a worker needs for them.
WORK_SECONDS = 0.4


def kill_again_and_again(ground, books, processes, **settings):
    """Repeatedly publish a portion, kill a worker at a random instant of its work, and start another.

    The accrual of a parked burn may be in flight in several killed workers in a row, and then behind a thousand
    suspects, which are applied one by one: so patience has its highest value here.
    """
    events = books.messages_for(MESSAGES)
    portion = -(-len(events) // KILLS)
    settings = {"burn_patience": 60, **settings}
    working = [ground.work(**settings) for _ in range(processes)]
    for start in range(0, len(events), portion):
        ground.publish(events[start : start + portion])
        time.sleep(books.random.uniform(0, WORK_SECONDS))
        working.pop(0).kill()
        working.append(ground.work(**settings))
    return f"{KILLS} SIGKILLs, processes: {processes}, settings: {settings}"


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_lost_when_workers_are_killed_at_any_instant(ground, books, processes):
    ground.open(books)
    with ground.redis() as client:
        client.lpush("tokens", books.invalid(), books.undecodable())
    faults = kill_again_and_again(ground, books, processes, batch_size=100)
    ground.drain(books, DRAIN_SECONDS).assert_nothing_lost(faults)


def test_a_message_on_its_way_to_a_frozen_idle_worker_is_not_lost(ground, books):
    freeze_idle_workers(ground, books, sized(2, 6)).assert_nothing_lost("idle workers frozen, then killed")


def test_on_the_stock_transport_the_same_freeze_loses_messages(ground, books):
    """The counter-proof: for kombu's own transport Redis pops the message, and the worker never receives it."""
    verdict = freeze_idle_workers(ground, books, sized(2, 6), transport="stock")
    with pytest.raises(AssertionError, match=r"\d of \d lost"):
        verdict.assert_nothing_lost("idle workers on the stock transport frozen, then killed")


def freeze_idle_workers(ground, books, times, **settings):
    """Repeatedly freeze a worker that waits for messages, publish one, kill the worker, and start another."""
    for _ in range(times):
        idle = ground.work(**settings)
        time.sleep(0.3)  # by then it waits for messages
        idle.freeze()
        ground.publish([books.single()])
        time.sleep(0.3)  # by then Redis has answered the waiting command
        idle.kill()
    ground.work(**settings)
    return ground.drain(books)


@pytest.mark.skipif(not LONG, reason="takes minutes: `make chaos` runs it")
def test_on_the_stock_transport_kills_lose_messages(ground, books):
    ground.open(books, worker_of={"transport": "stock"})
    faults = kill_again_and_again(ground, books, 1, transport="stock")
    verdict = ground.drain(books, DRAIN_SECONDS)
    print(f"{faults}: {verdict}")
    assert verdict.queued + verdict.in_flight == 0
    assert verdict.lost, "kombu's own transport is known to lose messages, and the suite saw none"


def test_a_frozen_worker_that_continues_changes_nothing(ground, books):
    """Frozen at a random instant for longer than the visibility timeout, while another worker decides its messages."""
    ground.open(books)
    settings = {"batch_size": 100, "idle_in_transaction_timeout": 1}
    sleeper, other = ground.work(**settings), None
    frozen_messages = 0
    rounds = sized(2, 6)
    for round_ in range(rounds):
        ground.publish(books.messages_for(2000))
        time.sleep(books.random.uniform(0, WORK_SECONDS))
        sleeper.freeze()
        frozen_messages += ground.in_flight()
        if round_ == 0:
            other = ground.work(**settings)
        time.sleep(2 * VISIBILITY_TIMEOUT)  # the length of the freeze
        ground.publish(books.messages_for(200))
        eventually(lambda: ground.queued() + ground.in_flight() == 0, seconds=240)  # longer than a burn may be parked
        sleeper.thaw()
        ground.publish(books.messages_for(200))
        sleeper, other = (sleeper, other) if round_ % 2 else (other, sleeper)
    verdict = ground.drain(books)
    verdict.assert_nothing_lost(f"{rounds} freezes, {frozen_messages} messages in flight in frozen workers")
    assert sleeper.alive
    assert other.alive


def test_rolling_restarts_under_load_leave_nothing_to_the_visibility_timeout(ground, books):
    """Each old worker stops, and requeues its messages at once instead of leaving them in flight for an hour."""
    ground.open(books)
    settings = {"batch_size": 100, "visibility_timeout": 3600}
    restarts = sized(3, 20)
    old = ground.work(**settings)
    with Stream(ground, books, sized(2000, 20_000)):
        for _ in range(restarts):
            new = ground.work(**settings)
            time.sleep(books.random.uniform(0, WORK_SECONDS))
            assert old.stop() == 0, old.log_end()
            old = new
    ground.drain(books).assert_nothing_lost(f"{restarts} rolling restarts")


def test_workers_with_either_transport_share_a_queue(ground, books):
    """Each restores the messages that the other leaves.

    kombu's own transport sends no heartbeats, so the timeout must be longer than its work.
    """
    ground.open(books)
    stock = ground.work(transport="stock", burn_patience=60, visibility_timeout=4)
    faults = kill_again_and_again(ground, books, 1, visibility_timeout=4)
    ground.drain(books, DRAIN_SECONDS).assert_nothing_lost(f"beside a stock worker: {faults}")
    assert stock.alive

"""Workers that are killed, frozen and replaced: nothing is lost, and nothing is decided twice."""

from __future__ import annotations

import time

import pytest

from tests.kit.wait import eventually

from .ground import LONG, VISIBILITY_TIMEOUT, Stream, sized

#: Kills and messages of one run.
KILLS, MESSAGES = sized(4, 40), sized(1_600, 20_000)

#: Seconds for all that is left then: what was restored twice is applied one by one.
DRAIN = sized(120, 400)

#: Seconds from the arrival of messages to the kill, at most: about what a worker needs for them.
WORK = 0.4


def kill_again_and_again(ground, books, processes, **settings):
    """Publish a portion, kill a worker at a random instant of its work, let another go on; and so on.

    A burn waits no longer than `burn_patience` for its accrual. That can be in dying hands several times in a row, and
    then behind a thousand messages that were restored twice, and are applied one by one, in another worker than its
    burn: so patience is as long here as it can be set.
    """
    events = books.messages_for(MESSAGES)
    portion = -(-len(events) // KILLS)
    settings = {"burn_patience": 60, **settings}
    working = [ground.work(**settings) for _ in range(processes)]
    for start in range(0, len(events), portion):
        ground.publish(events[start : start + portion])
        time.sleep(books.random.uniform(0, WORK))
        working.pop(0).kill()
        working.append(ground.work(**settings))
    return f"{KILLS} SIGKILLs, processes: {processes}, settings: {settings}"


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_lost_when_workers_are_killed_at_any_instant(ground, books, processes):
    ground.open(books)
    with ground.redis() as client:
        client.lpush("tokens", books.invalid(), books.undecodable())
    told = kill_again_and_again(ground, books, processes, batch_size=100)
    ground.drain(books, DRAIN).assert_nothing_lost(told)


def test_a_message_that_a_frozen_idle_worker_was_about_to_get_is_not_lost(ground, books):
    freeze_idle_workers(ground, books, sized(2, 6)).assert_nothing_lost("idle workers frozen, then killed")


def test_on_the_stock_transport_the_same_freeze_loses_messages(ground, books):
    """That the suite can fail: kombu's own transport has popped the message for a worker that will never see it."""
    verdict = freeze_idle_workers(ground, books, sized(2, 6), transport="stock")
    with pytest.raises(AssertionError, match=r"\d of \d lost"):
        verdict.assert_nothing_lost("idle workers on the stock transport frozen, then killed")


def freeze_idle_workers(ground, books, times, **settings):
    """Freeze a worker that waits for messages, publish one, kill the worker, start another; and so on."""
    for _ in range(times):
        idle = ground.work(**settings)
        time.sleep(0.3)  # it waits for messages by then
        idle.freeze()
        ground.publish([books.single()])
        time.sleep(0.3)  # for Redis to answer whoever had asked
        idle.kill()
    ground.work(**settings)
    return ground.drain(books)


@pytest.mark.skipif(not LONG, reason="takes minutes: `make chaos` runs it")
def test_on_the_stock_transport_kills_lose_messages(ground, books):
    ground.open(books, worker_of={"transport": "stock"})
    told = kill_again_and_again(ground, books, 1, transport="stock")
    verdict = ground.drain(books, DRAIN)
    print(f"{told}: {verdict}")
    assert verdict.queued + verdict.held == 0
    assert verdict.lost, "the harness saw none of the losses that kombu's own transport is known for"


def test_the_late_twin_of_a_frozen_worker_changes_nothing(ground, books):
    """Frozen at a random instant past the visibility timeout, its messages decided by another, then thawed."""
    ground.open(books)
    settings = {"batch_size": 100, "idle_in_transaction_timeout": 1}
    sleeper, other = ground.work(**settings), None
    in_hand = 0
    rounds = sized(2, 6)
    for round_ in range(rounds):
        ground.publish(books.messages_for(2000))
        time.sleep(books.random.uniform(0, WORK))
        sleeper.freeze()
        in_hand += ground.held()
        if round_ == 0:
            other = ground.work(**settings)
        time.sleep(2 * VISIBILITY_TIMEOUT)  # not a wait for something: this is the freeze
        ground.publish(books.messages_for(200))
        eventually(lambda: ground.queued() + ground.held() == 0, seconds=240)  # longer than a burn may wait
        sleeper.thaw()
        ground.publish(books.messages_for(200))
        sleeper, other = (sleeper, other) if round_ % 2 else (other, sleeper)
    verdict = ground.drain(books)
    verdict.assert_nothing_lost(f"{rounds} freezes, {in_hand} messages in frozen hands")
    assert sleeper.alive
    assert other.alive


def test_rolling_restarts_under_load_leave_nothing_to_the_visibility_timeout(ground, books):
    """Each old worker ends in good order; what it had in hand is put back at once, not in an hour."""
    ground.open(books)
    settings = {"batch_size": 100, "visibility_timeout": 3600}
    restarts = sized(3, 20)
    old = ground.work(**settings)
    with Stream(ground, books, sized(2000, 20_000)):
        for _ in range(restarts):
            new = ground.work(**settings)
            time.sleep(books.random.uniform(0, WORK))
            assert old.stop() == 0, old.log_end()
            old = new
    ground.drain(books).assert_nothing_lost(f"{restarts} rolling restarts")


def test_stock_and_ours_share_a_queue(ground, books):
    """Workers with either transport, ours killed again and again: each restores what the other left.

    Stock gives no sign of life, so a timeout shorter than its work would bring back what it is working on.
    """
    ground.open(books)
    stock = ground.work(transport="stock", burn_patience=60, visibility_timeout=4)
    told = kill_again_and_again(ground, books, 1, visibility_timeout=4)
    ground.drain(books, DRAIN).assert_nothing_lost(f"beside a stock worker: {told}")
    assert stock.alive

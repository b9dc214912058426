"""An event that kills whoever decides it: found out, kept as a dead letter, and nobody else is blamed."""

from __future__ import annotations

import time

from .ground import VISIBILITY_TIMEOUT, sized

#: A worker that has an event in hand is killed by it so often: twice among others, then alone until it is sentenced.
AMONG_OTHERS, ALONE = 2, 5


def test_an_event_that_kills_its_worker_becomes_a_dead_letter_and_its_neighbours_are_applied(ground, books):
    ground.open(books)
    neighbours = books.messages_for(sized(60, 1500))
    key = books.poison()
    ground.publish([*neighbours[: len(neighbours) // 2], key, *neighbours[len(neighbours) // 2 :]])
    deadline = time.monotonic() + 300
    deaths = 0
    worker = ground.work(poison=key.idempotency_key)
    while not (ground.queued() + ground.held() == 0 and ground.decided() == len(books.expected)):
        if time.monotonic() > deadline:
            break  # the verdict says what is wrong
        if worker.alive:
            time.sleep(0.05)
        else:
            deaths += 1
            worker = ground.start(poison=key.idempotency_key)
    verdict = ground.drain(books)
    verdict.assert_nothing_lost(f"{deaths} workers died of one event, visibility timeout {VISIBILITY_TIMEOUT} s")
    with ground.connect() as connection:
        letters = connection.execute("SELECT idempotency_key, reason, detail FROM dead_letter").fetchall()
    print(letters)
    assert [letter[:2] for letter in letters] == [(key.idempotency_key, "poison")]
    assert deaths == AMONG_OTHERS + ALONE
    with ground.redis() as client:
        assert client.exists("unacked_restores") == 0, "the count outlives its message"

"""A poison message kills each worker that applies it: it becomes a dead letter, and no other message does."""

from __future__ import annotations

import time

from .ground import VISIBILITY_TIMEOUT, sized

#: How many workers it kills: twice in a batch with others, then in five solo attempts.
IN_BATCHES, SOLO_ATTEMPTS = 2, 5


def test_an_event_that_kills_its_worker_becomes_a_dead_letter_and_its_neighbours_are_applied(ground, books):
    ground.open(books)
    neighbours = books.messages_for(sized(60, 1500))
    poison = books.poison()
    ground.publish([*neighbours[: len(neighbours) // 2], poison, *neighbours[len(neighbours) // 2 :]])
    deadline = time.monotonic() + 300
    deaths = 0
    worker = ground.work(poison=poison.idempotency_key)
    while not (ground.queued() + ground.in_flight() == 0 and ground.decided() == len(books.expected)):
        if time.monotonic() > deadline:
            break  # the verdict reports what is wrong
        if worker.alive:
            time.sleep(0.05)
        else:
            deaths += 1
            worker = ground.start(poison=poison.idempotency_key)
    verdict = ground.drain(books)
    verdict.assert_nothing_lost(f"{deaths} workers killed by one event, visibility timeout {VISIBILITY_TIMEOUT} s")
    with ground.connect() as connection:
        letters = connection.execute("SELECT idempotency_key, reason, detail FROM dead_letter").fetchall()
    print(letters)
    assert [letter[:2] for letter in letters] == [(poison.idempotency_key, "poison")]
    assert deaths == IN_BATCHES + SOLO_ATTEMPTS
    with ground.redis() as client:
        assert client.exists("unacked_restores") == 0, "the count of restores is left behind"

"""What happens to the money. Read in this order:

rules.py         may this event move this balance? (pure)
deliveries.py    what goes in: one arrival of an event
outcomes.py      the answers an event can get
chain.py         the canonical form of what is recorded, and its hash
apply.py         one batch in one transaction: lock, look up, decide, record
rows.py          the rows that a batch writes: their fields are the tables' columns
locks.py         the SQL of row locks: taken by batches, and polled when another session holds them
store.py         the other SQL of a batch
pgtext.py        values as PostgreSQL reads them: COPY lines and array literals
errors.py        which errors are an event's own fault; all others are transient
session.py       the connection: opened, replaced, its outages reported
bisection.py     a batch until it is decided: wait out transient errors, single out culprits
settle.py        Ledger: settles batches, polls what parked events wait for
dead_letters.py  messages without an outcome, and what operators do with them
invariants.py    what must always be true, a sentence and a query each
"""

"""What happens to the money. Read in this order:

rules.py         may this event move this balance? (pure)
deliveries.py    what goes in: one arrival of an event
outcomes.py      the answers an event can get
chain.py         the canonical form of what is recorded, and its hash
apply.py         one batch in one transaction: lock, look up, decide, record
store.py         the SQL that apply.py and settle.py need
errors.py        whose fault an error is: the event's, or nobody's
settle.py        a batch until it is decided: wait out "not now", single out the event's own fault
dead_letters.py  messages without an outcome
letterbox.py     the same as operators meet them: found, replayed, discarded, purged
invariants.py    what must always be true, a sentence and a query each
"""

-- Replaces the record of an undecodable message by one that kombu's own transport can restore, too.
-- KEYS: unacked. ARGV: tag, record. Does nothing if the message is no longer in flight.
return redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 and redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) or -1

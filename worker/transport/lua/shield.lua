-- Gives the record of an undecodable message a form that kombu's own transport can restore as well.
-- KEYS: unacked. ARGV: tag, record. Nothing happens when it is no longer held.
return redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 and redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) or -1

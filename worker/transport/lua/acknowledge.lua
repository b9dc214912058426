-- Forgets messages for good.
-- KEYS: unacked, unacked_index, unacked_restores. ARGV: number of tags, the tags, then the sha1 of those messages
-- among them that had been restored.
local count = tonumber(ARGV[1])
redis.call('ZREM', KEYS[2], unpack(ARGV, 2, count + 1))
redis.call('HDEL', KEYS[1], unpack(ARGV, 2, count + 1))
if #ARGV > count + 1 then redis.call('HDEL', KEYS[3], unpack(ARGV, count + 2)) end
return count

-- Refreshes the time of messages in `unacked_index`: their worker is alive.
-- KEYS: unacked_index. ARGV: how many tags earlier calls of the same heartbeat refreshed; the tags, oldest first.
-- Returns the number of tags.
-- XX refreshes existing members only: the late heartbeat of a worker that was frozen must not add a message that
-- another worker has restored.
local clock = redis.call('TIME')
local now = clock[1] + (clock[2] + ARGV[1]) / 1000000
local scores = {}
for i = 2, #ARGV do
  scores[#scores + 1] = now + i / 1000000 -- one microsecond apart, which keeps their order
  scores[#scores + 1] = ARGV[i]
end
redis.call('ZADD', KEYS[1], 'XX', unpack(scores))
return #ARGV - 1

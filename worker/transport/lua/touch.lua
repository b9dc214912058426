-- A sign of life: these messages are in good hands.
-- KEYS: unacked_index. ARGV: how many were touched before these in the same round, then the tags, oldest first.
-- XX: a worker that wakes up late must not bring back what was restored meanwhile. Returns how many it still holds.
local clock = redis.call('TIME')
local now = clock[1] + (clock[2] + ARGV[1]) / 1000000
local scores = {}
for i = 2, #ARGV do
  scores[#scores + 1] = now + i / 1000000
  scores[#scores + 1] = ARGV[i]
end
redis.call('ZADD', KEYS[1], 'XX', unpack(scores))
return #ARGV - 1

-- Adds to the number of solo attempts on a message, or subtracts attempts that a worker survived.
-- KEYS: unacked_restores. ARGV: the message's field, the number to add (negative: to subtract).
local change = tonumber(ARGV[2])
if change < 0 and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end -- acknowledged in the meantime
redis.call('HINCRBY', KEYS[1], ARGV[1], change)
return redis.call('EXPIRE', KEYS[1], 604800) -- a week, as in restore.lua

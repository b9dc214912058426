-- Counts something against a message, or takes it back. KEYS: unacked_restores. ARGV: its field, by how much.
local by = tonumber(ARGV[2])
if by < 0 and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end -- acknowledged meanwhile
redis.call('HINCRBY', KEYS[1], ARGV[1], by)
return redis.call('EXPIRE', KEYS[1], 604800) -- as in restore.lua

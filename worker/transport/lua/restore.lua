-- Restores messages whose last heartbeat is older than the visibility timeout, and counts that against each of them.
-- Appended to return_to_list.lua. Further ARGV: visibility timeout in seconds, maximum of messages.
-- Starts with the newest and pushes to the right, where consumers pop: the oldest is served first, in the old order.
-- Returns the number of restored messages, the number of messages that fit no list (they stay in `unacked`, and the
-- next try comes a visibility timeout later), and 1 if there may be more to restore, else 0.
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local max = tonumber(ARGV[7])
local expired = redis.call('ZRANGE', index, now - tonumber(ARGV[6]), '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, max)
local restored, stuck, processed = 0, 0, 0
for _, tag in ipairs(expired) do
  if bytes_left <= 0 then break end
  processed = processed + 1
  local message = return_to_list(tag, 'RPUSH')
  if not message then
    stuck = stuck + 1
    redis.call('ZADD', index, 'XX', now, tag)
  elseif message ~= '' then
    restored = restored + 1
    redis.call('HINCRBY', restores, redis.sha1hex(message), 1)
  end
end
-- A week: the counts of messages that were purged must not stay for ever.
if restored > 0 then redis.call('EXPIRE', restores, 604800) end
return { restored, stuck, (processed < #expired or #expired == max) and 1 or 0 }

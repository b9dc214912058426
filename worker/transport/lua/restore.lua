-- Puts back what nobody has given a sign of life for, and counts it against the message.
-- ARGV also: seconds without a sign of life, most messages.
-- Newest first and to the right, where consumers pop: so the oldest is served first, and in the old order.
-- Returns how many went back, how many fit nowhere (they stay, and are tried again a timeout later), and whether
-- there may be more.
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local most = tonumber(ARGV[7])
local late = redis.call('ZRANGE', index, now - tonumber(ARGV[6]), '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, most)
local restored, stuck, seen = 0, 0, 0
for _, tag in ipairs(late) do
  if room <= 0 then break end
  seen = seen + 1
  local item = put_back(tag, 'RPUSH')
  if not item then
    stuck = stuck + 1
    redis.call('ZADD', index, 'XX', now, tag)
  elseif item ~= '' then
    restored = restored + 1
    redis.call('HINCRBY', restores, redis.sha1hex(item), 1)
  end
end
if restored > 0 then redis.call('EXPIRE', restores, 604800) end -- a week: what is purged leaves no trace for ever
return { restored, stuck, (seen < #late or #late == most) and 1 or 0 }

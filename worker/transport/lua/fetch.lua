-- Moves messages from lists to `unacked`, as if in no time: whoever dies afterwards, the message is recorded.
-- It never looks into a message, so no content can make it fail.
--
-- KEYS: unacked, unacked_index, unacked_restores, then the lists in the order in which they are served.
-- ARGV: most messages, most bytes (the first message may exceed them), prefix of this fetch's tags, then for
--       each list what closes its records, or '' where nobody will acknowledge and nothing is to be recorded.
-- Returns whether a limit ended it (1 or 0), then for each message: list (from 0), bytes, how often restored, and how
-- often its worker died while it was in hand alone.
local unacked, index, restores = KEYS[1], KEYS[2], KEYS[3]
local left, room, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local counted = redis.call('EXISTS', restores) == 1
local out, taken, largest = { 0 }, 0, 1

for list = 4, #KEYS do
  local closing = ARGV[list]
  local slice = 1 -- grows: a list of huge messages must not be read into Lua before the first is measured
  while left > 0 and room > 0 do
    local ask = math.max(1, math.min(slice, left, math.floor(room / largest)))
    local items = redis.call('LRANGE', KEYS[list], -ask, -1)
    local records, scores, took = {}, {}, 0
    for i = #items, 1, -1 do
      local item = items[i]
      if taken > 0 and #item > room then
        room = 0
        break
      end
      took, taken = took + 1, taken + 1
      room, largest = room - #item, math.max(largest, #item)
      local tag = prefix .. taken
      records[2 * took - 1], records[2 * took] = tag, '[' .. item .. closing
      scores[2 * took - 1], scores[2 * took] = now + taken / 1000000, tag -- microseconds keep the order
      local name = counted and redis.sha1hex(item)
      local found = counted and redis.call('HGET', restores, name)
      local alone = found and redis.call('HGET', restores, 'alone:' .. name)
      out[#out + 1] = list - 4
      out[#out + 1] = item
      out[#out + 1] = found and tonumber(found) or 0
      out[#out + 1] = alone and tonumber(alone) or 0
    end
    if took > 0 then
      if closing ~= '' then -- recorded first: should this fail, the list is as it was
        redis.call('HSET', unacked, unpack(records))
        redis.call('ZADD', index, unpack(scores))
      end
      redis.call('LTRIM', KEYS[list], 0, -(took + 1))
    end
    left = left - took
    if took < ask then break end
    slice = math.min(slice * 4, 64)
  end
end
if left <= 0 or room <= 0 then out[1] = 1 end
return out

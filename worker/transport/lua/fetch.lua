-- Moves messages from their lists to `unacked` in one step: if the worker dies afterwards, every message is recorded.
-- Never parses a message, so no content can make it fail.
--
-- KEYS: unacked, unacked_index, unacked_restores, then the lists in the order in which they are served.
-- ARGV: maximum of messages, maximum of bytes (the first message may exceed it), prefix of this fetch's tags, then for
--       each list the end of its records (see return_to_list.lua), or '' if its messages need no acknowledgement and
--       no record.
-- Returns 1 if a limit ended the fetch, else 0; then for each message: number of its list (from 0), the message, how
-- often it was restored, and how often a worker died while it had this message and no other in flight.
local unacked, index, restores = KEYS[1], KEYS[2], KEYS[3]
local messages_left, bytes_left, tag_prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local any_restored = redis.call('EXISTS', restores) == 1
local reply, fetched, largest = { 0 }, 0, 1

for list = 4, #KEYS do
  local record_end = ARGV[list]
  local slice = 1 -- grows: a list of huge messages must not be read into Lua before the first one is measured
  while messages_left > 0 and bytes_left > 0 do
    local asked = math.max(1, math.min(slice, messages_left, math.floor(bytes_left / largest)))
    local messages = redis.call('LRANGE', KEYS[list], -asked, -1)
    local records, scores, taken = {}, {}, 0
    for i = #messages, 1, -1 do
      local message = messages[i]
      if fetched > 0 and #message > bytes_left then
        bytes_left = 0
        break
      end
      taken, fetched = taken + 1, fetched + 1
      bytes_left, largest = bytes_left - #message, math.max(largest, #message)
      local tag = tag_prefix .. fetched
      records[2 * taken - 1], records[2 * taken] = tag, '[' .. message .. record_end
      scores[2 * taken - 1], scores[2 * taken] = now + fetched / 1000000, tag -- microseconds keep the order
      local sha1 = any_restored and redis.sha1hex(message)
      local restored = any_restored and redis.call('HGET', restores, sha1)
      local deaths = restored and redis.call('HGET', restores, 'alone:' .. sha1)
      reply[#reply + 1] = list - 4
      reply[#reply + 1] = message
      reply[#reply + 1] = restored and tonumber(restored) or 0
      reply[#reply + 1] = deaths and tonumber(deaths) or 0
    end
    if taken > 0 then
      if record_end ~= '' then -- recorded first: if this fails, the list is unchanged
        redis.call('HSET', unacked, unpack(records))
        redis.call('ZADD', index, unpack(scores))
      end
      redis.call('LTRIM', KEYS[list], 0, -(taken + 1))
    end
    messages_left = messages_left - taken
    if taken < asked then break end
    slice = math.min(slice * 4, 64)
  end
end
if messages_left <= 0 or bytes_left <= 0 then reply[1] = 1 end
return reply

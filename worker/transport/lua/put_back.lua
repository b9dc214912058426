-- Shared by restore.lua and requeue.lua: from a record in `unacked` back to its list, byte for byte.
-- A record is [message,"exchange","routing key"], as kombu's own transport writes it. Ours has the queue as
-- routing key, no exchange, and one space before the bracket per step of the list's priority.
--
-- KEYS: unacked, unacked_index, unacked_restores.
-- ARGV: key prefix, what separates queue and priority, prefix of binding tables, beginning of an undecodable's
--       envelope, most bytes (the first record may exceed them).
local unacked, index, restores = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, separator, bindings, envelope = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local room = tonumber(ARGV[5])
local QUOTE, COMMA, SPACE, BACKSLASH, BRACKET = 34, 44, 32, 92, 93

-- Where the JSON string begins whose closing quote is at `stop`; nil when none does.
local function string_before(text, stop)
  if text:byte(stop) ~= QUOTE then return nil end
  for start = stop - 1, 2, -1 do
    if text:byte(start) == QUOTE then
      local escapes = 0
      while text:byte(start - 1 - escapes) == BACKSLASH do escapes = escapes + 1 end
      if escapes % 2 == 0 then return start end
    end
  end
end

local function skip(text, stop, byte)
  while text:byte(stop) == byte do stop = stop - 1 end
  return stop
end

local function plain(text, start, stop)
  local ok, decoded = pcall(cjson.decode, '[' .. text:sub(start, stop) .. ']')
  return ok and decoded[1] or nil
end

-- message, exchange, routing key and priority of a record; nil when it is none.
local function parts(record)
  if record:byte(#record) ~= BRACKET then return nil end
  local key_stop = skip(record, #record - 1, SPACE)
  local key_start = string_before(record, key_stop)
  if not key_start then return nil end
  local comma = skip(record, key_start - 1, SPACE)
  local exchange_stop = skip(record, comma - 1, SPACE)
  local exchange_start = record:byte(comma) == COMMA and string_before(record, exchange_stop)
  if not exchange_start then return nil end
  comma = skip(record, exchange_start - 1, SPACE)
  if record:byte(comma) ~= COMMA then return nil end
  return record:sub(2, comma - 1), plain(record, exchange_start, exchange_stop),
    plain(record, key_start, key_stop), #record - 1 - key_stop
end

-- The lists that a message goes back to; none when its exchange has no such binding.
local function lists_of(exchange, routing_key, priority)
  if exchange == '' then
    local suffix = priority > 0 and separator .. priority or ''
    return { key_prefix .. routing_key .. suffix }
  end
  local found = {}
  local members = redis.pcall('SMEMBERS', key_prefix .. bindings .. exchange)
  for _, member in ipairs(members) do -- "routing key <sep> pattern <sep> queue"
    local first = member:find(separator, 1, true)
    local second = first and member:find(separator, first + #separator, true)
    if second and member:sub(1, first - 1) == routing_key then
      found[#found + 1] = key_prefix .. member:sub(second + #separator)
    end
  end
  return found
end

local DIGIT = {}
for i = 1, 64 do
  DIGIT[('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'):byte(i)] = i - 1
end

-- What an undecodable message was before it got its envelope. A large one keeps it: decoding blocks Redis.
local function original(item)
  if #item > 65536 or item:sub(1, #envelope) ~= envelope then return item end
  local body = item:match('"body":"([%w+/]*)=*"}$')
  if not body then return item end
  local bytes, value, bits = {}, 0, 0
  for i = 1, #body do
    value, bits = value * 64 + DIGIT[body:byte(i)], bits + 6
    if bits >= 8 then
      bits = bits - 8
      local byte = math.floor(value / 2 ^ bits)
      bytes[#bytes + 1], value = string.char(byte), value - byte * 2 ^ bits
    end
  end
  return table.concat(bytes)
end

-- Returns the message put back; '' when there was no record; nil when it fits nowhere and stays in `unacked`.
local function put_back(tag, push)
  local record = redis.call('HGET', unacked, tag)
  local item = ''
  if record then
    local exchange, routing_key, priority
    item, exchange, routing_key, priority = parts(record)
    if not item or type(exchange) ~= 'string' or type(routing_key) ~= 'string' then return nil end
    item = original(item)
    local placed = 0
    for _, list in ipairs(lists_of(exchange, routing_key, priority)) do
      if type(redis.pcall(push, list, item)) == 'number' then placed = placed + 1 end
    end
    if placed == 0 then return nil end
    room = room - #item
    redis.call('HDEL', unacked, tag)
  end
  redis.call('ZREM', index, tag)
  return item
end

-- Shared by requeue.lua and restore.lua: returns a message from `unacked` to its list, byte for byte.
-- A record in `unacked` is [message,"exchange","routing key"], as kombu's own transport writes it. Records of our
-- transport have the queue as routing key, an empty exchange, and before the bracket as many spaces as the number of
-- the list's priority.
--
-- KEYS: unacked, unacked_index, unacked_restores.
-- ARGV: global key prefix, separator of queue and priority, prefix of kombu's binding tables, beginning of an
--       undecodable message's envelope, maximum of bytes (the first message may exceed it).
local unacked, index, restores = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, separator, bindings, envelope = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local bytes_left = tonumber(ARGV[5])
local QUOTE, COMMA, SPACE, BACKSLASH, BRACKET = 34, 44, 32, 92, 93

-- Position of the opening quote of the JSON string whose closing quote is at `stop`; nil if there is none.
local function string_start(text, stop)
  if text:byte(stop) ~= QUOTE then return nil end
  for start = stop - 1, 2, -1 do
    if text:byte(start) == QUOTE then
      local escapes = 0
      while text:byte(start - 1 - escapes) == BACKSLASH do escapes = escapes + 1 end
      if escapes % 2 == 0 then return start end
    end
  end
end

-- Position of the last byte up to `stop` that is not `byte`.
local function skip_back(text, stop, byte)
  while text:byte(stop) == byte do stop = stop - 1 end
  return stop
end

local function decode_string(text, start, stop)
  local ok, decoded = pcall(cjson.decode, '[' .. text:sub(start, stop) .. ']')
  return ok and decoded[1] or nil
end

-- Message, exchange, routing key and priority of a record; nil if it is not a record.
local function parse(record)
  if record:byte(#record) ~= BRACKET then return nil end
  local key_stop = skip_back(record, #record - 1, SPACE)
  local key_start = string_start(record, key_stop)
  if not key_start then return nil end
  local comma = skip_back(record, key_start - 1, SPACE)
  local exchange_stop = skip_back(record, comma - 1, SPACE)
  local exchange_start = record:byte(comma) == COMMA and string_start(record, exchange_stop)
  if not exchange_start then return nil end
  comma = skip_back(record, exchange_start - 1, SPACE)
  if record:byte(comma) ~= COMMA then return nil end
  return record:sub(2, comma - 1), decode_string(record, exchange_start, exchange_stop),
    decode_string(record, key_start, key_stop), #record - 1 - key_stop
end

-- The lists that a message belongs to; none if its exchange has no binding for the routing key.
local function lists_of(exchange, routing_key, priority)
  if exchange == '' then
    local suffix = priority > 0 and separator .. priority or ''
    return { key_prefix .. routing_key .. suffix }
  end
  local lists = {}
  local members = redis.pcall('SMEMBERS', key_prefix .. bindings .. exchange)
  for _, member in ipairs(members) do -- "routing key <sep> pattern <sep> queue"
    local first = member:find(separator, 1, true)
    local second = first and member:find(separator, first + #separator, true)
    if second and member:sub(1, first - 1) == routing_key then
      lists[#lists + 1] = key_prefix .. member:sub(second + #separator)
    end
  end
  return lists
end

local DIGIT = {}
for i = 1, 64 do
  DIGIT[('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'):byte(i)] = i - 1
end

-- The bytes of an undecodable message without its envelope. A large one keeps the envelope: decoding blocks Redis.
local function unwrap(message)
  if #message > 65536 or message:sub(1, #envelope) ~= envelope then return message end
  local body = message:match('"body":"([%w+/]*)=*"}$')
  if not body then return message end
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

-- Returns the message that was pushed; '' if there was no record; nil if it fits no list and stays in `unacked`.
local function return_to_list(tag, push)
  local record = redis.call('HGET', unacked, tag)
  local message = ''
  if record then
    local exchange, routing_key, priority
    message, exchange, routing_key, priority = parse(record)
    if not message or type(exchange) ~= 'string' or type(routing_key) ~= 'string' then return nil end
    message = unwrap(message)
    local pushed = 0
    for _, list in ipairs(lists_of(exchange, routing_key, priority)) do
      if type(redis.pcall(push, list, message)) == 'number' then pushed = pushed + 1 end
    end
    if pushed == 0 then return nil end
    bytes_left = bytes_left - #message
    redis.call('HDEL', unacked, tag)
  end
  redis.call('ZREM', index, tag)
  return message
end

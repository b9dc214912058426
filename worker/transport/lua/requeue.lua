-- Requeues messages: their worker is alive and returns them to their lists. Not counted against them.
-- Appended to return_to_list.lua. Further ARGV: RPUSH (served next) or LPUSH (served last); the tags, oldest first.
-- Returns how many of the tags, from the first on, are left because the limit in bytes was reached.
local push = ARGV[6]
local tags = #ARGV
while tags > 6 and bytes_left > 0 do
  return_to_list(ARGV[tags], push) -- a message that fits no list stays in `unacked`; the next restore reports it
  tags = tags - 1
end
return tags - 6

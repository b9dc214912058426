-- Puts these messages back without counting it against them: their worker is well and gives them up.
-- ARGV also: RPUSH (served next) or LPUSH (served last), then the tags, oldest first.
-- Returns how many of the tags, from the first, are still to be done because the bytes were used up.
local push = ARGV[6]
local tags = #ARGV
while tags > 6 and room > 0 do
  put_back(ARGV[tags], push) -- what fits nowhere stays in `unacked`, and the next restore reports it
  tags = tags - 1
end
return tags - 6

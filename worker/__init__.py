"""From events in Redis to rows in PostgreSQL, and the answers from there. Each imports what is below it:

cli/          the command `tokentrail`
local/        all of it on one machine: servers of our own, `up`, the demo
flower_server.py  Flower, closed to the pages of other sites
output.py     tables, bars and amounts for the terminal
app.py        the Celery application
queue/        from Redis to a batch
read/         the read side: the HTTP API, and what commands read
transport/    Redis ↔ kombu
ledger/       what happens to the money
readiness.py  the checks before a worker starts
migration.py  Alembic: the schema brought to another revision
processes.py  child processes that live and die together
log.py        how log lines are formatted
listening.py  an address to listen on
hosts.py      the names by which API and Flower may be addressed
schema_version.py  whether this code can work with the database's schema
db.py         connections to PostgreSQL
config.py     every setting
files.py      files and folders that no other account can have planted
errors.py     the base of errors that end a command with one sentence
"""

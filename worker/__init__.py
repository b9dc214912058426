"""From events in Redis to rows in PostgreSQL, and the answers from there. Each imports what is below it:

cli/          the command `tokentrail`
local/        all of it on one machine: servers of our own, `up`, the demo
window.py     Flower, closed to pages of other sites
output.py     what a person sees in the terminal
app.py        the Celery application
queue/        from Redis to a batch
read/         answers
transport/    Redis ↔ kombu
ledger/       what happens to the money
readiness.py  what a worker looks at before it starts
processes.py  child processes that live and die together
log.py        the form of a log line
listening.py  an address to listen on
hosts.py      by which names we may be asked over HTTP
schema_version.py  which revision the database is at
db.py         connections to PostgreSQL
config.py     every setting
files.py      files and folders that nobody else can have planted
"""

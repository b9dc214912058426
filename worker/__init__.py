"""From events in Redis to rows in PostgreSQL, and the answers from there. Each imports what is below it:

cli/          the command `tokentrail`
up.py         all of it on one machine
demo/         a small token economy to look at
window.py     Flower, closed to pages of other sites
show.py       what a person sees in the terminal
app.py        the Celery application
queue/        from Redis to a batch
read/         answers
ledger/       what happens to the money
processes.py  child processes that live and die together
log.py        the form of a log line
listening.py  an address to listen on
hosts.py      by which names we may be asked over HTTP
db.py         connections to PostgreSQL, the version of its schema
embedded/     PostgreSQL and Valkey of our own
config.py     every setting
files.py      files and folders that nobody else can have planted
"""

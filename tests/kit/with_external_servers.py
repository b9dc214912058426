"""Run a command with DATABASE_URL and BROKER_URL of servers that it did not start: `with_external_servers.py pytest …`.

The servers are those that TOKENTRAIL_PG_BIN and TOKENTRAIL_VALKEY_SERVER name, so that the suite meets Debian's as a
user's own: the command finds no embedded server.
"""

from __future__ import annotations

import os
import subprocess
import sys

from worker.local.embedded import servers

if __name__ == "__main__":
    with servers() as running:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENTRAIL_")}
        environment |= {"DATABASE_URL": running.database_url, "BROKER_URL": running.broker_url}
        sys.exit(subprocess.run(sys.argv[1:], env=environment, check=False).returncode)

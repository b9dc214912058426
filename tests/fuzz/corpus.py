"""Where `decoder.py` sets out from: `python -m fuzz.corpus FOLDER` writes the known killers, and the bodies in them."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

from tests.fuzz.hostile import killers


def _body(raw: bytes) -> bytes:
    found = re.match(rb'{"body": "([A-Za-z0-9+/]*=*)"', raw)
    return base64.b64decode(found[1]) if found else b""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, killer in enumerate(killers(folder / "never")):
        for kind, data in (("message", killer.raw), ("body", _body(killer.raw))):
            if 0 < len(data) < 20_000:
                (folder / f"{kind}-{number}").write_bytes(data)

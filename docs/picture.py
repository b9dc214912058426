"""`python docs/picture.py`: run the demo and draw what a terminal shows of it, README's `docs/demo.svg`."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from worker.cli.running import on_throw_away_servers
from worker.config import settings
from worker.local.demo import Economy, show

terminal = Console(
    record=True, force_terminal=True, color_system="truecolor", width=128, highlight=False, file=StringIO()
)
terminal.print("[bold]$[/] tokentrail demo")
show(on_throw_away_servers(settings(), Economy(1, "picture", 5000), Console(stderr=True)), terminal)
picture = terminal.export_svg(title="tokentrail")
# Without fonts from elsewhere: who reads a README should not be seen by a third party.
picture = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", picture, flags=re.DOTALL)
Path(__file__).with_name("demo.svg").write_text("\n".join(filter(str.strip, picture.splitlines())) + "\n")

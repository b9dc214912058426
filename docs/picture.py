"""`python docs/picture.py`: run the demo and save its output as README's picture, `docs/demo.svg`."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from worker.config import load_settings
from worker.local.demo import Economy, run_on_throw_away_servers, show

terminal = Console(
    record=True, force_terminal=True, color_system="truecolor", width=128, highlight=False, file=StringIO()
)
terminal.print("[bold]$[/] tokentrail demo")
show(run_on_throw_away_servers(load_settings(), Economy(1, "picture", 5000), Console(stderr=True)), terminal)
picture = terminal.export_svg(title="tokentrail")
# Without remote fonts: reading a README must not tell a third party.
picture = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", picture, flags=re.DOTALL)
Path(__file__).with_name("demo.svg").write_text("\n".join(filter(str.strip, picture.splitlines())) + "\n")

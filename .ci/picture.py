"""Draw README's picture from what the quickstart printed.

lightning-peft fit --config configs/quickstart.yaml 2>&1 | python .ci/picture.py examples/images/quickstart.svg
"""

import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 100
HEADINGS = ("LoRA", "Next", "$")


def main() -> None:
    """Standard input to an SVG of a terminal; of each progress bar only its last state."""
    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(Text("$ lightning-peft fit --config configs/quickstart.yaml", style="bold green"))
    for line in sys.stdin.read().splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", line).rsplit("\r", 1)[-1].rstrip()
        if not line or line.startswith(("Tokenising", "Restoring", "Loaded")):
            continue
        if len(line) > WIDTH:
            line = line[: WIDTH - 1] + "…"
        console.print(Text(line, style="bold" if line.startswith(HEADINGS) else ""))
    console.save_svg(sys.argv[1], title="lightning-peft")


if __name__ == "__main__":
    main()

"""`python -m benchmarks floor [--json] [--quick] [--only NAME ...]`: all figures, as one object.

Every ratio is measured against its counterpart in the same run, in turn (A B A B ...), each in a
process of its own; the median of the pairs counts. Absolute figures stand beside, for orientation
only: the machine is noisy.
"""

from __future__ import annotations

import argparse
import json
import sys

from ._figures import FIGURES, measure


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=["floor"], help="which figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: a smoke test")
    parser.add_argument("--only", nargs="*", choices=sorted(FIGURES), help="these figures only")
    options = parser.parse_args()
    figures = measure(options.only or list(FIGURES), quick=options.quick, say=_say)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value:12.3f}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

"""Peers that quantize a whole model, or live in an interpreter of their own.

    PYTHON outside_peers.py --list
    PYTHON outside_peers.py SOURCE FOLDER METHOD VARIANT [--calibration FILE]

--list prints as JSON what can be made with the packages of this interpreter.
"""

import json
import sys


def main() -> None:
    """List what can be made here."""
    if sys.argv[1:] != ["--list"]:
        sys.exit("no peer of this name can be made here; --list shows which can")
    print(json.dumps([]))


if __name__ == "__main__":
    main()

import sys
from pathlib import Path

# The scripts of deploy/ are not part of the distribution.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy"))

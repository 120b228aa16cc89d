"""What arbitration buys and costs. Each command runs as a file and as a module of this package."""

import sys
from pathlib import Path

# Neither the root nor this folder may stay on the path: the root's ``kernels`` would shadow the package of that name
# that transformers imports. The modules of this package are found without them.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (_HERE, _HERE.parent)]

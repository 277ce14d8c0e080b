"""Makes the faults importable by their own names, which the soak tool and their processes need too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""Makes the harness importable by its own name, which pickles of its models need."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

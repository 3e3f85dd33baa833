"""`python -m benchmarks.mtk`."""

import sys

from benchmarks.mtk.run import main

sys.exit(main())

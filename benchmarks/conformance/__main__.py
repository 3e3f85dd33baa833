"""`python -m benchmarks.conformance`."""

import sys

from benchmarks.conformance.run import main

sys.exit(main())

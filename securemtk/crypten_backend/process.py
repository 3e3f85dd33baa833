"""A role of CrypTen's backend as a process; `roles` says what it does.

Apart from it, for the package imports `roles`, and Python warns of a module that is imported and then run.
"""

import os
import sys
from io import TextIOWrapper

from securemtk.crypten_backend.roles import serve
from securemtk.serving.process import PipeStarter, run

if __name__ == "__main__":
    announce = os.fdopen(os.dup(1), "wb")
    # From here on what the program prints goes elsewhere, line by line: the pipe is for the address.
    os.dup2(2, 1)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    status = run(serve, PipeStarter(sys.stdin.buffer, announce))
    # Nothing is left to save but an unfinished line: do not wait for the interpreter to take torch apart.
    sys.stdout.flush()
    os._exit(status)

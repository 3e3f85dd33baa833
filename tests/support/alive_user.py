"""A user whose process a test can drive, hold and stop: one command a line, one line of JSON for each."""

import ctypes
import json
import sys
import time

import numpy as np
import small_models

from securemtk import Session

X = np.random.default_rng(0).uniform(-1, 1, (2, 8)).astype(np.float32)


def main(timeout_s: str) -> None:
    """Answer until stdin ends."""
    with Session(timeout_s=float(timeout_s)) as session:
        model = session.load(small_models.mlp())

        def say(**line) -> None:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()

        say(pids=session.pids)
        for line in sys.stdin:
            command, *numbers = line.split()
            start = time.monotonic()
            try:
                if command == "predict":
                    for _ in range(int(numbers[0])):
                        scores = model.predict(X)["y"]
                    say(y=scores.tolist(), seconds=time.monotonic() - start)
                elif command == "hold":
                    # Called with the interpreter's lock held: no other thread of Python's runs meanwhile.
                    ctypes.PyDLL(None).usleep(int(1e6 * float(numbers[0])))
                    say(held=time.monotonic() - start)
                elif command == "sort":
                    names = [str(n * 7919 % 10_000_019) for n in range(int(numbers[0]))]
                    start = time.monotonic()
                    names.sort()
                    say(held=time.monotonic() - start)
            except Exception as error:
                say(error=type(error).__name__, said=str(error), seconds=time.monotonic() - start)


if __name__ == "__main__":
    main(sys.argv[1])

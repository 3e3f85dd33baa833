"""What the files of a run's folder are called."""

RUN, CHECKPOINT, KEYS, KEY_SUFFIX = "run.json", "checkpoint.pt", "keys", ".key"

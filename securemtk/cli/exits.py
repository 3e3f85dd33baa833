"""Exit statuses of the command line.

0 done; 1 an error of ours (please report it); 2 wrong usage; 3 bad input; 4 an unsupported model; 5 the protocol was
aborted; 6 the disk or system refused; 130 Ctrl-C; 143 ended from outside.
"""

INTERNAL, USAGE, INPUT, UNSUPPORTED, ABORTED, SYSTEM, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 5, 6, 130, 143

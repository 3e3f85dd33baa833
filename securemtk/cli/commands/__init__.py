"""The commands, a file for each; each has an `app` of one command, and is imported when it is called."""

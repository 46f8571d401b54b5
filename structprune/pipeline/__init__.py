"""One file per command: the stories that the command line tells."""

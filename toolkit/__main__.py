"""`python -m toolkit`, where the command `toolkit` is not on the path."""

from toolkit.cli import main

main()

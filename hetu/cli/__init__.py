"""The command line, ``hetu`` and ``python -m hetu``: a file per command, told in ``docs/command-line.md``."""

"""``python -m hetu``: see :mod:`hetu.cli`."""

import sys

from hetu.cli.main import main

sys.exit(main())

"""`python -m hrt_cli`, which is `hrt`; as in `accelerate launch -m hrt_cli distill ...`."""

import sys

from . import main

sys.exit(main())

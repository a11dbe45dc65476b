"""`python -m hrt_cli`, which is `hrt`; as in `accelerate launch -m hrt_cli distill ...`."""

import sys

from . import main

sys.argv[0] = "hrt"  # for the command that is written beside a figure
sys.exit(main())

"""`python -m service` is the same as `llm2vec-service`."""

import sys

from service.cli import main

sys.exit(main())

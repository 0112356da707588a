"""`python -m service` is `llm2vec-service`."""

import sys

from service.cli import main

sys.exit(main())

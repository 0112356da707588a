"""See `__main__`. Where pydantic is missing something empty stands in for `model_store.manifest`."""

import importlib.util
import sys
from unittest.mock import MagicMock

if importlib.util.find_spec("pydantic") is None:
    sys.modules["model_store.manifest"] = MagicMock()

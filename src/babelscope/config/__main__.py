"""`python -m babelscope.config`: check params.yaml before DVC reads it, whose own messages name no key."""

import sys

from babelscope.config import check_folders, load
from babelscope.core.errors import UserError

try:
    check_folders(load())
except UserError as wrong:
    sys.exit(f"error: {wrong}")

"""Ends with 0 while the service answers that it is live. Python, because a slim image has no curl."""

import os
import sys
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('MOE_PORT', '8000')}/v2/health/live"
try:
    with urllib.request.urlopen(url, timeout=4) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except OSError as error:
    sys.exit(f"{url}: {error}")

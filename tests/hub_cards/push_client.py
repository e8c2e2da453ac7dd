"""Push once for each set of arguments in a JSON list on stdin, and print JSON: the outcomes and the whole log."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback

logged = io.StringIO()
logging.basicConfig(stream=logged, level=logging.DEBUG)

from jacobi_hf.hub_cards import push_to_hub  # noqa: E402

outcomes = []
for arguments in json.load(sys.stdin):
    try:
        outcomes.append({"url": push_to_hub(**arguments).url})
    except Exception as error:
        outcomes.append({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
sys.stdout.write(json.dumps({"outcomes": outcomes, "logged": logged.getvalue()}))

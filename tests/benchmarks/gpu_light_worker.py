"""A worker that needs no torch, and so starts at once: gives a row, starts a child, and hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    row = {"name": "child", "outcome": "measured", "words": "", "values": {"pid": child.pid}}
    os.write(int(sys.argv[3]), json.dumps({"row": row}).encode() + b'\n{"row": "of which there is only ha')
    time.sleep(600)

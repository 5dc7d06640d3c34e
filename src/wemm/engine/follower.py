"""`python -m wemm.engine.follower`: a rank that a leader started. Its orders come through standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from wemm.config import EngineConfig
from wemm.engine.build import build_rank
from wemm.engine.worker import follow, join
from wemm.platforms import resolve_platform
from wemm.platforms.topology import CpuShare


def _end_with_the_leader() -> None:
    sys.stdin.read()  # returns when the pipe closes
    os._exit(1)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's to handle
    rank, port, options, share = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    config = EngineConfig(**options)
    platform = resolve_platform(config.device, rank)
    platform.occupy(share and CpuShare(*share))
    group = join(port, rank, config, platform.collective_backend)
    follow(build_rank(config, platform, group), group)


if __name__ == "__main__":
    _main()

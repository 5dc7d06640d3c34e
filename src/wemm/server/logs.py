"""Logs as JSON lines on stderr: one object per record, nothing of what users wrote."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone

from wemm.errors import ParameterError

_LEVELS = ("debug", "info", "warning", "error")
_MAX_LEN = 2000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message; a record's own JSON object is merged in. Control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if fields is not None:
            line |= fields
        else:
            line["message"] = _CONTROL.sub(" ", record.getMessage())[:_MAX_LEN]
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-_MAX_LEN:]
        return json.dumps(line, ensure_ascii=True)


def set_up_logs(level: str) -> None:
    """All loggers of this process. Raises ParameterError."""
    if level not in _LEVELS:
        raise ParameterError(f"log_level must be one of {', '.join(_LEVELS)}. Given: {level!r}", "log_level")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("wemm").setLevel(level.upper())

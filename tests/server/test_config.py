"""What an operator can get wrong at the command line: one line, status 2, before anything is loaded."""

from __future__ import annotations

import logging
import socket

import pytest

from wemm.cli import main
from wemm.errors import ParameterError
from wemm.server.config import ServerConfig


@pytest.fixture(autouse=True)
def _logs_as_before():
    """The service sets up the logs of its process, which is that of the tests here."""
    root, ours = logging.getLogger(), logging.getLogger("wemm")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "a port is an integer from 0 to 65535. Given: 99999"),
        (["--host", "0.0.0.0"], "--allow-public"),
        (["--api-key", "short"], "at least 16 characters"),
        (["--admin-key", "short"], "at least 16 characters"),
        (["--tls-key", "key.pem"], "HTTPS needs both --tls-certificate and --tls-key"),
        (["--log-level", "loud"], "log_level must be one of debug, info, warning, error. Given: 'loud'"),
        (["--max-body-size", "4Q"], "a size is written like 4GiB"),
        (["--allowed-media-host", "http://x"], "an allowed media host is written like"),
        (["--config", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--max-queued-requests", "0"], "max_queued_requests must be a number of at least 1. Given: 0"),
        (["--decode-timeout", "nan"], "decode_timeout must be a number of at least 0.001. Given: nan"),
    ],
)
def test_mistakes_are_named(options, message, capsys):
    assert main(["serve", "--model", "nano", "--port", "0", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_no_model_is_loaded_for_a_service_that_cannot_listen(monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("wemm.server.serve.AsyncLLM", lambda **options: loaded.append(options))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", "nano", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main(["serve", "--model", "nano", "--port", "0", "--host", "0.0.0.0"]) == 2
    assert "--allow-public" in capsys.readouterr().err
    assert loaded == []


def test_a_model_must_be_named(capsys):
    assert main(["serve"]) == 2
    assert "give --model, or --config" in capsys.readouterr().err


def test_every_default_is_the_safe_one():
    config = ServerConfig()
    assert config.host == "127.0.0.1"
    assert not config.allow_public
    assert config.allowed_media_host == config.allowed_origin == []
    assert config.allowed_local_media_path is config.management_port is None
    with pytest.raises(ParameterError):
        ServerConfig(request_timeout=float("inf"))

"""`wemm serve --engine vllm` without vLLM: what it would be told."""

from __future__ import annotations

import json

import pytest

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.cli import main
from wemm.errors import ModelNotFoundError, ParameterError
from wemm.integrations.vllm.serve import command_line


def _options(arguments):
    """Flag → values."""
    found = {}
    for argument in arguments:
        if argument.startswith("--"):
            found[argument] = []
        else:
            found[list(found)[-1]].append(argument)
    return found


def test_the_defaults_are_the_safe_ones():
    options = _options(command_line({"model": "nano"}))
    assert options["--model"] == [str(BUNDLED_DIRECTORY / "nano")]
    assert options["--served-model-name"] == ["nano"]
    assert options["--host"] == ["127.0.0.1"]
    assert options["--allowed-media-domains"] == ["nothing.invalid"]
    assert options["--allowed-origins"] == ["[]"]
    assert json.loads(options["--limit-mm-per-prompt"][0]) == {"image": 20}
    assert json.loads(options["--override-generation-config"][0]) == {"temperature": 0}


def test_options_of_ours_become_those_of_vllm():
    given = {
        "model": "nano", "host": "10.0.0.1", "api_key": ["a", "b"], "tensor_parallel_size": 2, "max_images": 3,
        "enable_prefix_caching": False, "reference_image_mode": True, "allowed_media_host": ["example.com"],
    }  # fmt: skip
    options = _options(command_line(given, ["--pipeline-parallel-size", "2"]))
    assert options["--host"] == ["10.0.0.1"]
    assert options["--api-key"] == ["a", "b"]
    assert options["--tensor-parallel-size"] == ["2"]
    assert "--no-enable-prefix-caching" in options
    assert options["--allowed-media-domains"] == ["example.com"]
    assert json.loads(options["--limit-mm-per-prompt"][0]) == {"image": 3}
    assert json.loads(options["--mm-processor-kwargs"][0]) == {"reference_image_mode": True}
    assert options["--pipeline-parallel-size"] == ["2"]


def test_the_checkpoint_may_ask_for_sampling(tiny):
    (tiny / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    assert "--override-generation-config" not in command_line({"model": str(tiny)})


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({}, ParameterError, "--model"),
        ({"model": "wemm-chat-2k-cn"}, ParameterError, "directory or a hub id"),
        ({"model": "nothing-here"}, ModelNotFoundError, "no model"),
        ({"model": "nano", "num_speculative_tokens": 4}, ParameterError, "--num-speculative-tokens means nothing"),
    ],
)
def test_what_vllm_cannot_be_told_is_refused(given, error, problem):
    with pytest.raises(error, match=problem):
        command_line(given)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--engine", "other"], "must be wemm or vllm"),
        (["--", "--foo"], "only --engine vllm takes options behind --"),
        (["--engine", "vllm", "--config", "x.json"], "--config is read by our own engine"),
    ],
)
def test_mistakes_on_the_command_line(arguments, problem, capsys):
    assert main(["serve", "--model", "nano", *arguments]) == 2
    assert problem in capsys.readouterr().err

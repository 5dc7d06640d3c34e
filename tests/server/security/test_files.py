"""S6: of all files on the machine, those that are images below one directory can be read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from urllib.parse import quote

import pytest

from tests.server.conftest import IMAGES
from tests.server.security.conftest import MAX_IMAGE, about, answer_about, chat, refusal_of, wait_until

pytestmark = pytest.mark.security("S6")


@pytest.fixture(scope="module")
def tree(pictures):
    """What an attacker may have had put into the directory, and images outside that would be answered about."""
    outside = pictures.parent / "outside"
    beside = pictures.parent / "pictures-of-others"
    for directory in (outside, beside, pictures / "below"):
        directory.mkdir()
        (directory / "secret.png").write_bytes((IMAGES / "number.png").read_bytes())
    (pictures / "link.png").symlink_to(outside / "secret.png")
    (pictures / "relative-link.png").symlink_to("../outside/secret.png")
    (pictures / "linked").symlink_to(outside)
    (pictures / "up").symlink_to("..")
    (pictures / "loop").symlink_to("loop")
    (pictures / "passwd").symlink_to("/etc/passwd")
    (pictures / "zero").symlink_to("/dev/zero")
    (pictures / "inner-link.png").symlink_to("word.png")
    os.mkfifo(pictures / "pipe")
    os.mkfifo(outside / "pipe")
    return pictures


FORBIDDEN = [
    "file:///etc/passwd",
    "file:///etc/shadow",
    "file://localhost/etc/passwd#a.jpg",
    "file:///proc/self/environ",
    "file:///proc/self/mem",
    "file:///proc/self/fd/0",
    "file:///dev/zero",
    "file:///dev/stdin",
    "file:///dev/random",
    "file:///",
    "file:",
    "file:word.png",
    "file://word.png",
    "file:etc/passwd",
    "file:///../../etc/passwd",
    "file:{root}",
    "file:{root}/",
    "file:{root}/.",
    "file:{root}/below",
    "file:{root}/missing.png",
    "file:{root}/../outside/secret.png",
    "file:{root}/%2e%2e/outside/secret.png",
    "file:{root}/%2e%2e%2foutside%2fsecret.png",
    "file:{root}/..%5coutside/secret.png",
    "file:{root}/%252e%252e/outside/secret.png",
    "file:{root}/below/../../outside/secret.png",
    "file:{root}-of-others/secret.png",
    "file:{root}/link.png",
    "file:{root}/relative-link.png",
    "file:{root}/linked/secret.png",
    "file:{root}/up/outside/secret.png",
    "file:{root}/up/outside/pipe",
    "file:{root}/loop",
    "file:{root}/loop/word.png",
    "file:{root}/passwd",
    "file:{root}/zero",
    "file:{root}/pipe",
    "file:{root}/word.png/../link.png",
    "file:{root}/word.png?a=1",
    "file:{root}/word.png#fragment",
    "file:{root}/word.png%00.jpg",
    "file:{root}/word.png\0",
    "file://example.com{root}/word.png",
    "file://user@localhost{root}/word.png",
    "file://127.0.0.1{root}/word.png",
    "file:////{root}/../outside/secret.png",
    "file:{root}/" + "a" * 300,
    "file:{root}/" + "a/" * 3000,
]


ALLOWED = [
    "file://{root}/word.png",
    "FILE://localhost{root}/word.png",
    "file:{root}/word.png",
    "file://{root}/inner-link.png",
    "file://{root}/below/../word.png",
    "file://{root}/%77ord.png",
]


def test_missing_and_forbidden_files_are_the_same(alice, tree, each):
    for url in each(FORBIDDEN):
        started = time.monotonic()
        reason = refusal_of(alice, url.format(root=tree))
        assert reason == "the file is not there, or not under --allowed-local-media-path"
        assert time.monotonic() - started < 2


def test_what_lies_below_the_directory_is_read(alice, tree, each):
    for url in each(ALLOWED):
        assert answer_about(alice, url.format(root=tree)) == "WEMM"


def test_a_file_is_an_image_of_the_usual_size_or_nothing(alice, tree):
    (tree / "text").write_text("secret")
    (tree / "large").write_bytes(bytes(MAX_IMAGE + 1))
    (tree / "sparse").touch()
    os.truncate(tree / "sparse", 2**40)
    (tree / "empty").touch()
    (tree / "unreadable").touch(0o000)
    for name in ("text", "large", "sparse", "empty", "unreadable"):
        reason = refusal_of(alice, f"file:{tree}/{name}")
        assert "secret" not in reason
        assert str(tree) not in reason


def test_bare_paths_are_no_images(alice, tree):
    for path in (f"{tree}/word.png", "/etc/passwd", "word.png", "../word.png", "~/word.png"):
        assert "http:, https: or data:" in refusal_of(alice, path)
    body = {"messages": [{"role": "user", "content": [{"type": "image", "image": f"{tree}/word.png"}]}]}
    assert alice.post("/v1/chat/completions", json=body).status_code == 400
    # MindIE's clients may name a path; it is read where a URL would be.
    for path, words in ((f"{tree}/word.png", "WEMM"), ("/etc/host.conf", "the file is not there")):
        parts = [{"type": "image_url", "image_url": path}, {"type": "text", "text": "What word is written here?"}]
        assert words in alice.post("/infer", json={"inputs": parts}).text


SWAP = """
import os, sys
name, other, *targets = sys.argv[1:]
while True:
    for target in targets:
        os.symlink(target, other)
        os.replace(other, name)
"""


def test_a_link_that_changes_meanwhile_leads_nowhere(alice, tree):
    """As fast as it can between an image inside and one outside; the one outside has another size."""
    outside = tree.parent / "outside"
    (outside / "secret.png").write_bytes((IMAGES / "word.png").read_bytes())
    size = alice.post("/tokenize", json={"messages": about(f"file:{tree}/below/secret.png")}).json()[
        "image_tokens"
    ]
    places = map(str, (tree / "swapped", tree / "other", tree / "below", outside))
    swapping = subprocess.Popen([sys.executable, "-c", SWAP, *places])
    try:
        wait_until((tree / "swapped").is_symlink)
        messages = about(f"file:{tree}/swapped/secret.png")
        found = [alice.post("/tokenize", json={"messages": messages}) for _ in range(100)]
    finally:
        swapping.kill()
        swapping.wait()
    assert {answer.status_code for answer in found} <= {200, 400}
    assert {answer.json()["image_tokens"] for answer in found if answer.status_code == 200} <= {size}


def test_without_the_option_no_file_is_read(client, tree):
    for url in (f"file://{tree}/word.png", "file:///etc/passwd", "file:///no/such/file"):
        assert "file: URLs are not read here" in refusal_of(client, url)
    url = f"file://{quote(str(tree))}/word.png"
    assert (
        chat(client, [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]).status_code == 400
    )

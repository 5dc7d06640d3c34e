"""Hashes that were written down anywhere are held against the files; without any, nothing is claimed."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.doctor.files import SUMS_NAME, check_files, record_hashes
from wemm.errors import StorageError
from wemm.progress import silent

SHARD = "model-00001-of-00001.safetensors"


def _flip(path, at=-100, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def _git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_the_bundled_checkpoints_have_the_hashes_written_beside_them(name):
    check = check_files(BUNDLED_DIRECTORY / name, silent)
    assert check.status == "ok"
    assert check.figures["unrecorded"] == []
    assert check.figures["checked"] >= 6


def test_the_file_is_what_sha256sum_checks(patient):
    assert record_hashes(patient, silent) == 6
    result = subprocess.run(["sha256sum", "-c", SUMS_NAME], cwd=patient, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert not list(patient.glob(".*"))


def test_one_flipped_bit_in_a_shard(patient, diagnose):
    """The lowest bit of one weight: nothing but the hash can tell."""
    assert diagnose(patient, canaries=False, quick=True).ok
    record_hashes(patient, silent)
    _flip(patient / SHARD)
    report = diagnose(patient, canaries=False, quick=True)
    assert [check.name for check in report.checks if check.status == "fail"] == ["files"]
    assert report.causes[0].startswith(f"{SHARD} is not the file that was published")


def test_a_file_that_is_recorded_but_missing(patient):
    record_hashes(patient, silent)
    (patient / "tokenizer_config.json").unlink()
    check = check_files(patient, silent)
    assert (check.status, check.figures["missing"]) == ("fail", ["tokenizer_config.json"])


def test_nothing_recorded_is_no_fault_and_no_praise(patient):
    check = check_files(patient, silent)
    assert check.status == "ok"
    assert "not recorded" in check.detail
    assert check.figures["checked"] == 0


@pytest.mark.parametrize("line", ["nonsense", f"{'a' * 64}  ../config.json", f"{'a' * 63}  config.json"])
def test_a_list_that_cannot_be_read(patient, line):
    record_hashes(patient, silent)
    with (patient / SUMS_NAME).open("a") as file:
        file.write(f"{line}\n")
    assert check_files(patient, silent).status == "fail"


def test_a_list_in_the_binary_spelling_is_read(patient):
    record_hashes(patient, silent)
    lines = [line.split() for line in (patient / SUMS_NAME).read_text().splitlines()]
    (patient / SUMS_NAME).write_text("".join(f"{digest.upper()} *{name}\n" for digest, name in lines))
    check = check_files(patient, silent)
    assert (check.status, check.figures["checked"]) == ("ok", 6)


def test_the_cache_of_the_hub(patient, tmp_path):
    """A file is a link to blobs/HASH: SHA-256 of large files, git's hash of small ones."""
    blobs = tmp_path / "repo/blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "repo/snapshots/abc"
    snapshot.mkdir(parents=True)
    for path in patient.iterdir():
        data = path.read_bytes()
        is_large = path.name.endswith((".safetensors", ".model"))
        name = hashlib.sha256(data).hexdigest() if is_large else _git_hash(data)
        path.rename(blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    assert check_files(snapshot, silent).status == "ok"
    assert check_files(snapshot, silent).figures["checked"] == 6
    _flip((snapshot / SHARD).resolve())
    check = check_files(snapshot, silent)
    assert (check.status, check.figures["differing"]) == ("fail", [SHARD])


def test_a_download_to_a_directory(patient):
    """The client writes revision, ETag and time of every file beside it."""
    records = patient / ".cache/huggingface/download"
    records.mkdir(parents=True)
    for name in (SHARD, "config.json"):
        data = (patient / name).read_bytes()
        etag = hashlib.sha256(data).hexdigest() if name == SHARD else _git_hash(data)
        (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{etag}\n1700000000.0\n")
    assert check_files(patient, silent).status == "ok"
    (patient / "config.json").write_text((patient / "config.json").read_text() + "\n")
    check = check_files(patient, silent)
    assert check.status == "warn"
    assert "config.json edited since the download" in check.detail
    _flip(patient / SHARD)
    assert check_files(patient, silent).figures["differing"] == ["config.json", SHARD]


def test_a_directory_that_cannot_be_written(patient):
    (patient / f".{SUMS_NAME}.partial").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        record_hashes(patient, silent)

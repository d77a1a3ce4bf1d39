"""The record of a kept job: read as it was written, or refused with the reason."""

import json
from pathlib import Path

import msgspec
import pytest

from nbdbackup.daemon.jobs.record import JobRecord, RecordError, read_record, write_record
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.error_policy import OnError
from nbdbackup.job.sync import BitmapSyncMode, SyncMode

RECORD = JobRecord(
    uuid="00112233445566778899aabbccddeeff",
    node="disk",
    job_id="j",
    target="/backups/täglich.img",
    existing=False,
    is_remote=False,
    is_direct=True,
    target_device=1,
    target_inode=2,
    sync=SyncMode.BITMAP,
    bitmap="b",
    bitmap_mode=BitmapSyncMode.ALWAYS,
    speed=1 << 40,
    workers=8,
    chunk_bytes_max=1 << 20,
    cluster_bytes=1 << 16,
    use_copy_range=True,
    on_source_error=OnError.IGNORE,
    on_target_error=OnError.STOP,
    on_cbw_error=OnCbwError.BREAK_SNAPSHOT,
    cbw_timeout_s=1.5,
    auto_finalize=False,
    auto_dismiss=True,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_record(tmp_path / "disk@j.job", RECORD)
    return tmp_path / "disk@j.job"


def test_a_record_is_read_as_it_was_written_and_nothing_else_is_left(path: Path) -> None:
    assert read_record(path) == RECORD
    assert [each.name for each in path.parent.iterdir()] == ["disk@j.job"]


def test_every_character_of_the_job_that_is_changed_is_found_out(path: Path) -> None:
    text = path.read_text()
    for place in range(text.index('"job"') + 6, len(text) - 3):
        if text[place].isspace():
            continue
        changed = text[:place] + ("7" if text[place] != "7" else "8") + text[place + 1 :]
        path.write_text(changed)
        with pytest.raises(RecordError):
            read_record(path)


def test_a_record_that_was_cut_short_is_refused(path: Path) -> None:
    text = path.read_bytes()
    for length in range(0, len(text) - 2, 7):
        path.write_bytes(text[:length])
        with pytest.raises(RecordError, match="damaged"):
            read_record(path)


def test_a_record_of_another_version_is_refused_as_that(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"version": 9, "anything": document}))
    with pytest.raises(RecordError, match="it is of version 9, and this nbdbackup knows version 1 alone"):
        read_record(path)


def test_a_record_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file"):
        read_record(tmp_path / "none.job")


def test_a_file_that_is_not_surely_the_backup_s_is_not_removed(path: Path) -> None:
    target = path.with_name("target.img")
    partial = path.with_name("target.img.partial")
    record = msgspec.structs.replace(RECORD, target=str(target))
    partial.write_bytes(b"somebody else's")
    record.remove_partial()
    assert partial.exists()
    record.written_to(partial.stat()).remove_partial()
    assert not partial.exists()
    record.remove_partial()

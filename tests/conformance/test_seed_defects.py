"""The defects of QEMU 3.1's backup and of what came of it, and the tests that show ours without them.

The letters are those in the docstrings of tests: a to i are of QEMU 3.1's backup job, j to m of
snapshot-access, copy-before-write and persistent bitmaps of QEMU 7 to 10. Each test named here has been
seen to fail with the defect put in.
"""

import pytest

from tests.conformance.test_nbd_requirements import Row, names_in

DEFECTS = {
    "a": Row(
        "offload looked at its first cluster's bit only, and copied again what had changed since",
        (
            "unit/test_block_copy.py::test_offload_does_not_copy_a_saved_cluster_again",
            "unit/test_block_copy.py::test_a_saved_cluster_inside_a_larger_copy_is_not_copied_again",
        ),
    ),
    "b": Row(
        "offload ran past the end of the device",
        ("unit/test_block_copy.py::test_offload_stays_inside_the_device_and_the_chunk",),
    ),
    "c": Row(
        "the length of an offloaded copy was rounded up over the maximum",
        ("unit/test_block_copy.py::test_offload_stays_inside_the_device_and_the_chunk",),
    ),
    "d": Row(
        "offload ignored that compression was asked for: what cannot compress refuses it",
        (
            "unit/test_daemon_backups.py::test_what_is_refused_has_changed_nothing",
            "unit/test_backup_action.py::test_of_several_reasons_to_refuse_the_user_hears_qemus_first",
            "oracle/test_backup.py::test_what_backup_refuses",
        ),
    ),
    "e": Row(
        "source and target of different sizes were not refused",
        (
            "unit/test_target.py::test_an_existing_target_must_have_the_disks_size",
            "unit/test_daemon_backups.py::test_an_existing_target_of_another_size_is_left_alone",
            "unit/test_daemon_backups.py::test_what_is_refused_has_changed_nothing",
            "unit/test_block_copy.py::test_ends_of_different_sizes_are_refused",
        ),
    ),
    "f": Row(
        "top: clients' writes had clusters copied that the top layer does not hold",
        ("unit/test_backup_sync.py::test_top_saves_nothing_that_the_top_layer_does_not_hold",),
    ),
    "g": Row(
        "top: a source that could not say what it holds was an error of neither end",
        (
            "unit/test_backup_sync.py::test_top_blames_the_source_when_it_cannot_say_what_it_holds",
            "unit/test_backup_sync.py::"
            "test_top_fails_the_clients_write_as_for_any_copy_when_the_source_cannot_say",
        ),
    ),
    "h": Row(
        "incremental: a client's copy failed after the job had passed, which succeeded with a hole",
        (
            "unit/test_backup_sync.py::test_no_hole_is_left_where_a_clients_copy_failed",
            "unit/test_block_copy.py::test_a_second_copy_does_what_the_first_failed_to_do",
            "model/test_incremental_machine.py::test_machine_finds_what_is_missing",
        ),
    ),
    "i": Row(
        "incremental: progress fell below nothing when the last cluster was short",
        ("unit/test_backup_sync.py::test_what_is_dirty_is_copied_and_nothing_else",),
    ),
    "j": Row(
        "a read under way when its snapshot broke returned newer bytes, and later ones hid the cause",
        (
            "unit/test_snapshot_access.py::"
            "test_a_read_under_way_when_the_snapshot_breaks_fails_with_the_cause",
            "unit/test_snapshot_access.py::test_block_status_under_way_when_the_snapshot_breaks_fails",
            "interop/test_broken_snapshot.py::test_error_of_a_read_says_why_the_snapshot_is_broken",
        ),
    ),
    "k": Row(
        "a cbw-timeout above four seconds overflowed",
        ("unit/test_copy_before_write.py::test_long_timeouts_are_what_they_say",),
    ),
    "l": Row(
        "kill -9 left every persistent bitmap inconsistent",
        (
            "interop/test_persistent_bitmaps.py::test_bitmap_outlives_a_stop_and_a_kill",
            "interop/test_persistent_bitmaps.py::test_every_write_that_was_acknowledged_before_a_kill_is_dirty",
            "interop/test_persistent_bitmaps.py::test_after_kill_9_the_next_incremental_is_right_where_qemus_bitmap_is_inconsistent",
        ),
    ),
    "m": Row(
        "reads of a view returned newer bytes, and zeroes where clients trimmed",
        (
            "interop/test_view_races.py::"
            "test_reads_of_a_view_race_overlapping_writes_trims_and_zeroes_and_see_their_instant",
            "unit/test_fleece_waits.py::test_point_in_time_holds",
            "unit/test_snapshot_access.py::test_a_client_write_waits_for_block_status_of_the_source",
        ),
    ),
}


@pytest.mark.parametrize("letter", DEFECTS)
def test_defect_is_shown_to_be_gone_by_tests_that_exist(letter: str) -> None:
    row = DEFECTS[letter]
    assert row.tests, row.what
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), f"{letter}, {row.what}: there is no {test}"


def test_every_defect_has_a_row() -> None:
    assert "".join(DEFECTS) == "abcdefghijklm"

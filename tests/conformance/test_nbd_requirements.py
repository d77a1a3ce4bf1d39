"""What the NBD specification asks of a server, requirement by requirement, and the tests that show it.

Where a client has to keep or to check the same, the client role's tests are here too.

The numbers are those in the names and docstrings of tests, and in comments of the code. What is
deliberately different is in the README.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LAST = 90


@dataclass(frozen=True, slots=True)
class Row:
    """A requirement, and the tests of it as FILE::NAME."""

    what: str
    tests: tuple[str, ...]


REQUIREMENTS = {
    1: Row(
        "greeting: NBDMAGIC, IHAVEOPT, fixed newstyle and no zeroes",
        ("unit/test_nbd_negotiation.py::test_01_greeting_offers_fixed_newstyle_and_no_zeroes",),
    ),
    2: Row(
        "an unknown client flag disconnects",
        ("unit/test_nbd_negotiation.py::test_02_client_flag_that_was_not_offered_disconnects",),
    ),
    3: Row(
        "without C_FIXED_NEWSTYLE only EXPORT_NAME",
        ("unit/test_nbd_negotiation.py::test_03_without_fixed_newstyle_only_export_name_is_valid",),
    ),
    4: Row(
        "C_NO_ZEROES leaves the 124 zeroes out",
        (
            "unit/test_nbd_negotiation.py::test_04_and_15_export_name_answers_with_zeroes_unless_they_were_declined",
        ),
    ),
    5: Row(
        "TCP_NODELAY", ("unit/test_server_limits.py::test_05_tcp_connections_have_no_delay_and_keepalive",)
    ),
    6: Row(
        "one final reply for each option, which it echoes",
        ("unit/test_nbd_negotiation.py::test_06_several_options_in_one_packet_are_answered_in_order",),
    ),
    7: Row(
        "unknown option: ERR_UNSUP, in step",
        ("unit/test_nbd_negotiation.py::test_07_unknown_option_is_consumed_and_refused_in_step",),
    ),
    8: Row(
        "wrong option magic disconnects",
        ("unit/test_nbd_negotiation.py::test_08_wrong_option_magic_disconnects",),
    ),
    9: Row(
        "option length, count and handshake time are bounded",
        (
            "unit/test_nbd_negotiation.py::test_09_option_that_claims_too_much_disconnects",
            "unit/test_nbd_negotiation.py::test_09_too_many_options_disconnect_after_the_last_answer",
            "unit/test_server_limits.py::test_09_handshake_that_does_not_get_on_ends",
            "unit/test_nbd_negotiation.py::test_09_replies_to_pipelined_options_are_bounded",
        ),
    ),
    10: Row(
        "strings are UTF-8 without NUL, at most 4096 bytes",
        (
            "unit/test_nbd_negotiation.py::test_10_bad_export_name_is_invalid_and_keeps_step",
            "unit/test_nbd_negotiation.py::test_10_bad_name_in_export_name_disconnects",
            "unit/test_nbd_negotiation.py::test_10_names_and_descriptions_that_cannot_be_sent_are_refused",
        ),
    ),
    11: Row(
        "error replies carry text",
        (
            "unit/test_nbd_negotiation.py::test_07_unknown_option_is_consumed_and_refused_in_step",
            "unit/test_nbd_negotiation.py::test_10_longest_name_is_looked_up_and_the_error_fits_a_string",
        ),
    ),
    12: Row(
        "while shutting down: ERR_SHUTDOWN",
        (
            "unit/test_nbd_negotiation.py::test_12_while_shutting_down_only_abort_is_accepted",
            "unit/test_session_replies.py::test_12_negotiating_client_hears_of_the_shutdown",
        ),
    ),
    13: Row(
        "an unwanted option is an error, not a disconnect",
        (
            "unit/test_nbd_negotiation.py::test_07_unknown_option_is_consumed_and_refused_in_step",
            "unit/test_nbd_negotiation.py::test_34_missing_export_is_unknown_and_negotiation_goes_on",
        ),
    ),
    14: Row(
        "ERR_POLICY and ERR_TOO_BIG where they are due",
        (
            "unit/test_nbd_negotiation.py::test_20_starttls_is_refused_by_policy",
            "unit/test_nbd_negotiation.py::test_09_large_payload_that_nobody_needs_is_never_kept",
        ),
    ),
    15: Row(
        "EXPORT_NAME: size and flags, or disconnect",
        (
            "unit/test_nbd_negotiation.py::test_04_and_15_export_name_answers_with_zeroes_unless_they_were_declined",
            "unit/test_nbd_negotiation.py::test_15_export_name_of_a_missing_export_disconnects_without_a_byte",
        ),
    ),
    16: Row(
        "ABORT gets ACK, then close",
        (
            "unit/test_nbd_negotiation.py::test_16_abort_is_acknowledged_whatever_its_data",
            "unit/test_nbd_negotiation.py::test_16_options_behind_abort_are_not_answered",
        ),
    ),
    17: Row(
        "LIST: one SERVER for each export, then ACK",
        (
            "unit/test_nbd_negotiation.py::test_17_and_19_list_tells_every_export_each_time_it_is_asked",
            "unit/test_nbd_negotiation.py::test_17_list_of_no_exports_is_just_acknowledged",
        ),
    ),
    18: Row(
        "LIST with data: ERR_INVALID, in step",
        ("unit/test_nbd_negotiation.py::test_18_list_with_data_is_invalid_and_keeps_step",),
    ),
    19: Row(
        "LIST again: answered again",
        ("unit/test_nbd_negotiation.py::test_17_and_19_list_tells_every_export_each_time_it_is_asked",),
    ),
    20: Row(
        "without TLS, STARTTLS gets ERR_POLICY",
        (
            "unit/test_nbd_negotiation.py::test_20_starttls_is_refused_by_policy",
            "interop/test_tls.py::test_20_server_without_tls_says_so",
        ),
    ),
    21: Row(
        "FORCEDTLS: only STARTTLS and ABORT before TLS, else TLS_REQD",
        (
            "unit/test_nbd_starttls.py::test_21_server_that_requires_tls_answers_nothing_else_before_it",
            "unit/test_nbd_starttls.py::test_21_server_that_requires_tls_disconnects_export_name_and_lets_abort_go",
            "unit/test_nbd_starttls.py::test_21_client_that_gave_up_on_fixed_newstyle_cannot_get_round_tls",
            "interop/test_tls.py::test_21_client_without_tls_gets_tls_reqd_from_a_server_that_requires_it",
        ),
    ),
    22: Row(
        "SELECTIVETLS: TLS_REQD for exports that are for TLS alone",
        (
            "unit/test_nbd_starttls.py::test_22_export_for_tls_alone_tells_others_nothing_but_that",
            "unit/test_nbd_starttls.py::test_22_export_for_tls_alone_is_hidden_in_the_clear_and_export_name_of_it_disconnects",
            "unit/test_nbd_starttls.py::test_22_other_exports_go_without_tls_where_it_is_only_offered",
            "interop/test_tls.py::test_22_client_without_tls_sees_all_but_the_exports_for_tls_alone",
        ),
    ),
    23: Row(
        "STARTTLS: ACK, then TLS; a failed handshake ends the connection",
        ("interop/test_tls.py::test_23_failed_tls_handshake_ends_the_connection",),
    ),
    24: Row(
        "STARTTLS twice, or with data: ERR_INVALID",
        (
            "unit/test_nbd_starttls.py::test_24_second_starttls_is_invalid",
            "unit/test_nbd_starttls.py::test_24_starttls_with_data_is_invalid_and_keeps_step",
            "interop/test_tls.py::test_24_second_starttls_and_starttls_with_data_are_invalid",
        ),
    ),
    25: Row(
        "STARTTLS voids structured replies, extended headers and meta contexts",
        (
            "unit/test_nbd_starttls.py::test_25_starttls_forgets_structured_replies_and_meta_contexts",
            "unit/test_nbd_starttls.py::test_25_starttls_forgets_extended_headers",
            "interop/test_tls.py::test_25_what_was_agreed_on_in_the_clear_is_void_after_starttls",
        ),
    ),
    26: Row(
        "TLS 1.2 at least",
        (
            "unit/test_tls_credentials.py::test_26_nothing_older_than_tls_1_2_and_no_renegotiation_or_resumption",
            "unit/test_tls_credentials.py::test_26_client_of_tls_1_1_is_refused_and_one_of_1_2_is_not",
            "interop/test_tls.py::test_26_tls_1_1_is_not_spoken",
        ),
    ),
    27: Row(
        "bytes in the clear behind STARTTLS disconnect",
        (
            "unit/test_nbd_starttls.py::test_27_bytes_in_the_clear_behind_starttls_disconnect_without_an_answer",
            "unit/test_nbd_starttls.py::test_27_client_refuses_bytes_in_the_clear_behind_the_ack",
            "interop/test_tls.py::test_27_request_in_the_clear_behind_starttls_is_never_answered",
        ),
    ),
    28: Row(
        "INFO and GO payloads: malformed is ERR_INVALID",
        ("unit/test_nbd_negotiation.py::test_28_malformed_info_payload_is_invalid_and_keeps_step",),
    ),
    29: Row(
        "NBD_INFO_EXPORT, then ACK; nothing behind GO",
        (
            "unit/test_nbd_negotiation.py::test_29_go_tells_the_export_then_begins_transmission",
            "unit/test_nbd_negotiation.py::test_29_bytes_behind_go_belong_to_the_transmission_phase",
        ),
    ),
    30: Row(
        "unknown and repeated info types are tolerated",
        ("unit/test_nbd_negotiation.py::test_30_unknown_and_repeated_info_types_are_tolerated",),
    ),
    31: Row(
        "name and description on request",
        ("unit/test_nbd_negotiation.py::test_31_name_and_description_are_told_on_request_only",),
    ),
    32: Row("block sizes always", ("unit/test_nbd_negotiation.py::test_32_block_size_is_always_told",)),
    33: Row(
        "block sizes are sane",
        ("unit/test_nbd_negotiation.py::test_33_block_sizes_that_no_client_may_be_told_are_refused",),
    ),
    34: Row(
        "missing export: ERR_UNKNOWN, negotiation goes on",
        ("unit/test_nbd_negotiation.py::test_34_missing_export_is_unknown_and_negotiation_goes_on",),
    ),
    35: Row(
        "ERR_BLOCK_SIZE_REQD only where plain reading fails",
        (
            "unit/test_nbd_negotiation.py::test_35_large_minimum_is_insisted_on_only_to_clients_that_did_not_ask",
            "unit/test_nbd_negotiation.py::test_35_a_sector_is_not_insisted_on",
        ),
    ),
    36: Row(
        "INFO, then GO: the same", ("unit/test_nbd_negotiation.py::test_36_info_and_then_go_tell_the_same",)
    ),
    37: Row(
        "the empty name is the default export",
        ("unit/test_nbd_negotiation.py::test_37_empty_name_is_the_default_export",),
    ),
    38: Row(
        "STRUCTURED_REPLY: ACK, with data ERR_INVALID",
        (
            "unit/test_nbd_negotiation.py::test_38_structured_reply_is_acknowledged",
            "unit/test_nbd_negotiation.py::test_38_structured_reply_with_data_is_invalid_and_changes_nothing",
        ),
    ),
    39: Row(
        "from then on READ is answered in chunks",
        (
            "unit/test_transmission.py::test_39_61_success_without_data_is_one_whole_reply",
            "unit/test_session_replies.py::test_48_reads_and_writes_are_the_same_in_every_style",
        ),
    ),
    40: Row(
        "SET_META before chunks: ERR_INVALID",
        (
            "unit/test_nbd_negotiation.py::test_40_meta_context_before_structured_replies_is_invalid",
            "unit/test_nbd_negotiation.py::test_40_extended_headers_are_enough_for_meta_contexts",
        ),
    ),
    41: Row(
        "LIST_META: all, or those that queries and wildcards match; id 0",
        (
            "unit/test_nbd_negotiation.py::test_41_list_meta_context_answers_queries_with_id_0",
            "unit/test_session_replies.py::test_41_89_wildcards_list_the_contexts_below_them",
        ),
    ),
    42: Row(
        "SET_META: each once, unique ids, unknown ones ignored",
        ("unit/test_nbd_negotiation.py::test_42_set_meta_context_selects_each_once_with_its_own_id",),
    ),
    43: Row(
        "malformed meta context payload: ERR_INVALID",
        ("unit/test_nbd_negotiation.py::test_43_malformed_meta_context_payload_is_invalid",),
    ),
    44: Row(
        "every SET_META replaces the set; another export voids it",
        (
            "unit/test_nbd_negotiation.py::test_44_every_set_meta_context_replaces_the_selection_also_a_failed_one",
            "unit/test_nbd_negotiation.py::test_44_go_for_another_export_voids_the_selection",
        ),
    ),
    45: Row(
        "meta contexts of a missing export: ERR_UNKNOWN",
        ("unit/test_nbd_negotiation.py::test_45_meta_context_of_a_missing_export_is_unknown",),
    ),
    46: Row(
        "EXTENDED_HEADERS: ACK, with data ERR_INVALID; then no STRUCTURED_REPLY",
        (
            "unit/test_nbd_negotiation.py::test_46_extended_headers_are_granted_with_and_without_structured_replies",
            "unit/test_nbd_negotiation.py::test_46_extended_headers_with_data_are_invalid_and_keep_step",
            "unit/test_nbd_negotiation.py::test_46_structured_replies_after_extended_headers_are_refused",
            "unit/test_nbd_client.py::test_46_client_that_wants_extended_headers_asks_for_them_first",
            "unit/test_nbd_client.py::test_46_server_that_refuses_extended_headers_is_used_without_them",
        ),
    ),
    47: Row(
        "EXPORT_NAME after it disconnects",
        (
            "unit/test_nbd_negotiation.py::test_47_export_name_after_extended_headers_disconnects",
            "unit/test_nbd_client.py::test_47_export_name_is_not_asked_for_after_extended_headers",
        ),
    ),
    48: Row(
        "requests and replies of 32 bytes, cookie and offset echoed",
        (
            "unit/test_session_replies.py::test_48_reads_and_writes_are_the_same_in_every_style",
            "unit/test_session_replies.py::test_48_compact_request_after_extended_headers_disconnects",
            "unit/test_reply_encoding.py::test_48_extended_head_means_what_its_definition_says",
            "interop/test_extended_headers.py::test_libnbd_negotiates_extended_headers_and_reads_and_writes",
            "unit/test_nbd_extended_replies.py::test_48_extended_request_is_32_bytes_with_a_length_of_64_bits",
            "unit/test_nbd_extended_replies.py::test_48_reply_that_does_not_fit_its_read_is_a_breach",
            "interop/test_server_matrix.py::test_served_changed_and_backed_up_to",
        ),
    ),
    49: Row(
        "PAYLOAD_LEN on WRITE, or not; on another command EINVAL",
        (
            "unit/test_session_replies.py::test_49_write_goes_with_payload_len_and_without",
            "unit/test_session_replies.py::test_49_payload_of_another_command_is_consumed_and_invalid",
            "unit/test_nbd_extended_replies.py::test_49_extended_write_says_that_its_length_is_that_of_its_payload",
        ),
    ),
    50: Row(
        "a payload over the maximum disconnects",
        ("unit/test_session_replies.py::test_50_payload_over_the_limit_disconnects",),
    ),
    51: Row(
        "BLOCK_STATUS_EXT chunks",
        (
            "unit/test_reply_encoding.py::test_51_status_chunks_have_64_bit_extents",
            "unit/test_session_replies.py::test_51_73_ranges_of_64_bits_are_done_in_one_request",
            "interop/test_extended_headers.py::test_51_73_libnbd_s_64_bit_requests_are_done_at_once",
            "unit/test_nbd_extended_replies.py::test_51_status_that_does_not_fit_its_request_is_a_breach",
            "interop/test_long_requests.py::test_51_73_more_than_4_gib_is_one_request_where_headers_are_extended",
        ),
    ),
    52: Row(
        "BLOCK_STATUS with payload",
        (
            "unit/test_session_replies.py::test_52_block_status_with_payload_answers_for_the_named_contexts_only",
            "unit/test_session_replies.py::test_52_wrong_block_status_payload_is_consumed_and_invalid",
            "unit/test_session_replies.py::test_52_block_status_payload_is_not_offered_without_extended_headers",
        ),
    ),
    53: Row(
        "contexts of 64 bits only with extended headers",
        ("unit/test_session_replies.py::test_53_wide_context_is_for_extended_headers_only",),
    ),
    54: Row(
        "HAS_FLAGS always; READ_ONLY means that every write fails",
        (
            "unit/test_exports.py::test_54_55_57_flags_say_what_works",
            "unit/test_transmission.py::test_54_79_every_change_of_a_read_only_export_is_eperm",
        ),
    ),
    55: Row(
        "flags only for what works",
        (
            "unit/test_exports.py::test_54_55_57_flags_say_what_works",
            "unit/test_transmission.py::test_55_a_command_that_was_not_offered_is_refused",
        ),
    ),
    56: Row(
        "SEND_DF exactly when DF works",
        ("unit/test_nbd_negotiation.py::test_56_df_is_offered_exactly_with_structured_replies",),
    ),
    57: Row(
        "a flush on any connection covers all",
        ("unit/test_session_replies.py::test_57_flush_on_one_connection_covers_writes_of_all",),
    ),
    58: Row(
        "wrong request magic disconnects",
        (
            "unit/test_transmission.py::test_58_a_wrong_magic_ends_the_connection",
            "unit/test_session_end.py::test_58_garbage_ends_the_session_and_no_other",
        ),
    ),
    59: Row(
        "cookies are opaque, replies come in any order",
        ("interop/test_nbdsh.py::test_replies_out_of_order_on_many_handles_have_the_right_bytes",),
    ),
    60: Row(
        "errors carry text where there are chunks",
        (
            "unit/test_transmission.py::test_60_errors_carry_text_where_replies_are_structured",
            "unit/test_session_replies.py::test_48_60_64_extended_errors_have_text_and_the_offset_of_their_request",
        ),
    ),
    61: Row(
        "DONE only on the last chunk",
        (
            "unit/test_nbd_replies.py::test_61_none_chunk_is_empty_and_done",
            "unit/test_session_replies.py::test_48_61_success_without_data_is_one_message",
        ),
    ),
    62: Row(
        "data and holes cover the range once; holes are sent as holes",
        (
            "unit/test_session_replies.py::test_62_zeroes_are_sent_as_a_hole",
            "unit/test_session_replies.py::test_62_holes_of_a_sparse_file_are_not_read_but_told",
            "interop/test_extended_headers.py::test_62_libnbd_is_told_of_holes",
        ),
    ),
    63: Row(
        "a failed READ has no success header",
        (
            "unit/test_session_replies.py::test_63_simple_read_that_fails_has_no_success_header",
            "unit/test_session_replies.py::test_64_error_names_the_byte_where_the_device_failed",
        ),
    ),
    64: Row(
        "ERROR and ERROR_OFFSET",
        (
            "unit/test_session_replies.py::test_64_error_names_the_byte_where_the_device_failed",
            "unit/test_session_replies.py::test_64_error_of_unknown_place_has_no_offset",
            "unit/test_nbd_replies.py::test_64_error_chunks_carry_text_cut_to_a_legal_string",
        ),
    ),
    65: Row("DF: one content chunk", ("unit/test_session_replies.py::test_65_df_gets_one_content_chunk",)),
    66: Row(
        "length 0 does not disconnect",
        ("unit/test_session_replies.py::test_66_length_zero_does_not_disconnect",),
    ),
    67: Row(
        "the payload of a rejected WRITE is consumed",
        ("unit/test_session_replies.py::test_67_payload_of_a_rejected_write_is_consumed",),
    ),
    68: Row(
        "FLUSH takes no range", ("unit/test_nbd_transmission.py::test_68_flush_with_a_range_is_invalid",)
    ),
    69: Row(
        "TRIM of up to 4 GiB - 512 and more",
        (
            "unit/test_session_replies.py::test_69_trim_of_almost_4_gib_is_done",
            "interop/test_kernel.py::test_a_discard_of_the_whole_disk_in_giant_requests_spares_the_view",
        ),
    ),
    70: Row(
        "CACHE: unknown flags are rejected",
        (
            "unit/test_nbd_transmission.py::test_76_flag_that_the_protocol_does_not_define_is_invalid",
            "unit/test_transmission.py::test_76_each_command_takes_its_own_flags_and_no_others",
        ),
    ),
    71: Row(
        "WRITE_ZEROES reads back zero",
        ("interop/test_qemu_io.py::test_zeroes_read_back_and_give_space_back_only_when_allowed",),
    ),
    72: Row(
        "FAST_ZERO: fast, or ENOTSUP; not offered: EINVAL",
        (
            "unit/test_transmission.py::test_72_76_a_flag_that_was_not_offered_is_refused",
            "conformance/device_suite.py::test_zeroed_range_reads_zero_or_is_unchanged_if_fast_cannot_be",
            "unit/test_nbd_replies.py::test_81_some_errors_answer_only_the_flag_that_asks_for_them",
        ),
    ),
    73: Row(
        "ranges without payload may be longer than the maximum payload",
        (
            "unit/test_transmission.py::test_69_73_a_range_without_payload_may_be_longer_than_any_payload",
            "unit/test_session_replies.py::test_51_73_ranges_of_64_bits_are_done_in_one_request",
        ),
    ),
    74: Row(
        "BLOCK_STATUS: a chunk for each context; REQ_ONE",
        (
            "unit/test_session_replies.py::test_74_90_several_contexts_answer_each_in_a_chunk",
            "unit/test_session_replies.py::test_74_req_one_gets_exactly_one_extent_not_longer_than_asked",
            "unit/test_session.py::test_74_block_status_says_what_the_device_knows",
        ),
    ),
    75: Row(
        "BLOCK_STATUS without context or past the end: EINVAL",
        ("unit/test_session_replies.py::test_75_block_status_without_context_or_past_the_end_is_invalid",),
    ),
    76: Row(
        "FUA on any command; other flags only where documented",
        (
            "unit/test_nbd_transmission.py::test_76_fua_is_accepted_on_any_command_where_it_is_offered",
            "unit/test_nbd_transmission.py::test_76_flag_that_the_protocol_does_not_define_is_invalid",
        ),
    ),
    77: Row(
        "unknown command: EINVAL, no payload",
        ("unit/test_nbd_transmission.py::test_77_unknown_command_is_invalid_and_has_no_payload",),
    ),
    78: Row(
        "past the end: ENOSPC for writes, else EINVAL",
        (
            "unit/test_nbd_transmission.py::test_78_request_past_the_end_gets_its_command_s_error",
            "unit/test_transmission.py::test_78_a_range_past_the_end_is_refused_and_never_wraps",
        ),
    ),
    79: Row(
        "writing to a read-only export: EPERM",
        ("unit/test_session_replies.py::test_79_read_only_export_takes_no_write",),
    ),
    80: Row(
        "not aligned to the minimum: EINVAL",
        ("unit/test_nbd_transmission.py::test_80_request_not_aligned_to_the_minimum_is_invalid",),
    ),
    81: Row(
        "the host's errors become the protocol's",
        (
            "unit/test_nbd_replies.py::test_81_host_errors_become_the_protocol_s",
            "unit/test_session.py::test_81_a_devices_failure_is_answered_with_the_protocols_error",
        ),
    ),
    82: Row(
        "no other error reaches the wire",
        ("unit/test_nbd_replies.py::test_82_only_the_protocol_s_errors_reach_the_wire",),
    ),
    83: Row(
        "32 MiB advertised, 64 MiB accepted",
        (
            "unit/test_transmission.py::test_83_84_a_payload_over_the_limit_is_refused_cleanly",
            "interop/test_libnbd.py::test_nbdinfo_sees_what_the_export_can_do",
        ),
    ),
    84: Row(
        "clients that did not ask for sizes get clean errors",
        ("unit/test_transmission.py::test_83_84_a_payload_over_the_limit_is_refused_cleanly",),
    ),
    85: Row(
        "FLUSH and FUA: durable before the reply",
        (
            "unit/test_session_replies.py::test_85_flush_reaches_the_device_after_the_write_it_was_told_of",
            "unit/test_session.py::test_fua_and_the_other_flags_reach_the_device",
        ),
    ),
    86: Row(
        "DISC: finish and answer all, then close",
        (
            "unit/test_session_replies.py::test_86_disconnect_answers_what_is_outstanding",
            "unit/test_session_end.py::test_86_disc_answers_everything_in_flight_before_the_end",
        ),
    ),
    87: Row(
        "shutdown: finished, or ESHUTDOWN",
        ("unit/test_session_replies.py::test_87_shutdown_answers_what_is_in_flight_and_refuses_what_waits",),
    ),
    88: Row(
        "base:allocation: HOLE and ZERO",
        (
            "unit/test_session.py::test_74_block_status_says_what_the_device_knows",
            "interop/test_libnbd.py::test_nbdinfo_map_follows_the_image",
        ),
    ),
    89: Row(
        "qemu:dirty-bitmap:NAME and its wildcards",
        (
            "unit/test_session_replies.py::test_41_89_wildcards_list_the_contexts_below_them",
            "unit/test_session_replies.py::test_74_90_several_contexts_answer_each_in_a_chunk",
        ),
    ),
    90: Row(
        "qemu:allocation-depth",
        (
            "unit/test_session_replies.py::test_74_90_several_contexts_answer_each_in_a_chunk",
            "conformance/device_suite.py::test_allocation_depth_covers_the_range",
        ),
    ),
}


@cache
def names_in(file: str) -> frozenset[str]:
    """The names of all tests in `file`, those of classes too."""
    nodes = ast.walk(ast.parse((TESTS / file).read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_requirement_has_a_row() -> None:
    assert set(REQUIREMENTS) == set(range(1, LAST + 1))


@pytest.mark.parametrize("number", REQUIREMENTS)
def test_requirement_is_shown_by_tests_that_exist(number: int) -> None:
    row = REQUIREMENTS[number]
    assert row.tests, row.what
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), f"{number}, {row.what}: there is no {test}"

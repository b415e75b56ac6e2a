//! The conformance suite on the first Vulkan device (or the one that `RINGKERNEL_VULKAN_DEVICE` names), in each mode,
//! under the validation layer where it is installed.
//!
//! Not shown here, because a shader can neither wait for the host outside the rings nor panic: the tests whose kernels are
//! held by a gate, and those of panics. `tests/vulkan.rs` has their likes for shaders.

#![cfg(feature = "vulkan")]

// Some of the suite is for other backends.
#[allow(dead_code)]
mod conformance;
#[path = "support/vulkan.rs"]
mod vulkan;

/// The suite for one mode.
macro_rules! mode {
    ($module:ident, $mode:ident, $echo_bytes:expr, $ping_pongs:expr) => {
        mod $module {
            use ringkernel::{RuntimeBuilder, RuntimeConfig, VulkanMode};

            pub struct Vulkan;

            impl crate::conformance::Subject for Vulkan {
                const ECHO_BYTES: u64 = $echo_bytes;
                const PING_PONGS: u32 = $ping_pongs;

                fn builder_with(config: RuntimeConfig) -> RuntimeBuilder {
                    crate::vulkan::builder(VulkanMode::$mode, config)
                }

                fn missing() -> Option<String> {
                    crate::vulkan::missing()
                }

                fn inspect() {
                    crate::vulkan::expect_no_validation_message();
                }
            }

            crate::conformance! { crate::$module::Vulkan:
                messages::{
                    echo_returns_every_size_unchanged_and_in_order,
                    a_payload_one_byte_too_long_is_refused_and_loses_nothing,
                    typed_messages_travel_there_and_back,
                    a_message_of_another_type_stays_where_it_is,
                    a_type_that_was_not_registered_is_refused,
                    a_corrupt_archive_is_an_error_of_that_message_alone,
                    handler_errors_reach_the_caller_and_are_counted,
                    a_handler_may_reply_any_number_of_times,
                    a_full_reply_ring_holds_requests_back,
                    a_quarter_of_a_busy_ring_comes_back,
                    a_message_before_the_deadline_is_never_missed,
                    a_receive_without_timeout_is_a_try,
                    timestamps_of_one_kernel_strictly_increase,
                    extensions_travel_with_their_message,
                    saxpy_computes_what_it_says,
                    all_devices_calculate_alike,
                    batches_arrive_whole_and_in_order,
                    messages_are_read_and_written_in_place,
                    bad_correlations_are_refused,
                    state_is_kept_between_messages,
                    an_error_in_a_batch_is_not_lost,
                    a_message_in_place_is_checked_for_its_type,
                }
                sharing::{
                    cloned_handles_lose_and_double_nothing,
                    calls_from_many_threads_never_mix,
                    replies_put_aside_by_calls_can_be_received,
                    an_inbox_that_nobody_empties_overflows_into_the_dead_letters,
                    split_is_exclusive_and_gives_back,
                    a_grid_spreads_messages_and_keeps_keys_together,
                    every_wait_strategy_delivers,
                    auto_starves_nobody,
                    received_messages_make_room_in_the_inbox,
                    a_message_that_stays_is_found_again_on_a_grid,
                    split_is_refused_while_another_thread_waits,
                }
                life::{
                    an_unknown_kernel_is_refused_with_a_list,
                    bad_launch_options_are_refused,
                    bad_configurations_are_refused,
                    transitions_are_enforced,
                    each_state_refuses_sends_with_an_error_of_its_own,
                    deactivation_keeps_state_and_queue,
                    a_kernel_blocked_on_a_full_reply_ring_can_be_deactivated_and_terminated,
                    terminate_wakes_those_who_wait_for_room_and_for_replies,
                    handles_endpoints_and_runtime_may_be_dropped_in_any_order,
                    drain_delivers_what_is_in_flight_and_its_report_adds_up,
                    what_is_queued_at_shutdown_is_returned,
                    the_life_of_a_runtime_only_goes_forward,
                    nothing_can_be_committed_after_the_end,
                    names_are_unique_and_clean,
                }
                numbers::{
                    many_launches_leave_nothing_behind,
                    a_default_echo_takes_little_memory,
                }
                faults::{
                    memory_that_is_not_there_is_an_error,
                }
            }
        }
    };
}

mode!(resident, Resident, 1 << 20, 1_000_000);
// A submission a message.
mode!(exchange, Exchange, 2 << 20, 50_000);
mode!(staged, Staged, 2 << 20, 50_000);

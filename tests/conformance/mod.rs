//! What must hold on every backend, as functions over a [`Subject`]. A backend's own test file instantiates all of them
//! by [`conformance!`].

pub mod accounts;
pub mod bounds;
pub mod bridged;
pub mod clients;
pub mod faults;
pub mod foreign;
pub mod kernels;
pub mod letters;
pub mod life;
pub mod messages;
pub mod numbers;
pub mod pipeline_ends;
pub mod pipelines;
pub mod shared;
pub mod sharing;
pub mod time;
pub mod topics;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringkernel::{
    Error, KernelHandle, LaunchOptions, RingKernelRuntime, RuntimeBuilder, RuntimeConfig,
};

/// A backend under test.
pub trait Subject {
    /// Most memory that a default `echo` takes.
    const ECHO_BYTES: u64 = 1 << 20;

    /// Whether blocks are threads of this process.
    const THREADS: bool = false;

    /// Messages of the longest ping-pong.
    const PING_PONGS: u32 = 1_000_000;

    /// A builder for a runtime on this backend, with whatever it needs added to this configuration.
    fn builder_with(config: RuntimeConfig) -> RuntimeBuilder;

    /// The same with the default configuration.
    fn builder() -> RuntimeBuilder {
        Self::builder_with(RuntimeConfig::default())
    }

    /// Why this machine cannot run the suite on it, if so.
    fn missing() -> Option<String> {
        None
    }

    /// Looks at what a test may have left behind.
    fn inspect() {}
}

/// Long enough for anything on a machine with two shared cores; a test that waits so long has failed.
pub const LONG: Duration = Duration::from_secs(30);

/// Kernels and callers that spin starve each other: tests run one at a time.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A runtime that knows the test kernels.
pub fn runtime<S: Subject>() -> RingKernelRuntime {
    runtime_from(S::builder())
}

/// The same from a builder that has been configured.
pub fn runtime_from(builder: RuntimeBuilder) -> RingKernelRuntime {
    kernels::all()
        .into_iter()
        .fold(builder, RuntimeBuilder::register)
        .build()
        .unwrap()
}

/// Launches and activates one block of a kernel.
pub fn active(runtime: &RingKernelRuntime, id: &str, options: LaunchOptions) -> KernelHandle {
    let kernel = runtime.launch(id, 1, 1, options).unwrap();
    let begin = std::time::Instant::now();
    loop {
        match kernel.activate() {
            // Beside busy processes a kernel's thread may get no turn within the configured time.
            Err(Error::Timeout { .. }) if begin.elapsed() < LONG => {}
            activated => break activated.unwrap(),
        }
    }
    kernel
}

/// Rings of sixteen slots.
pub fn small() -> LaunchOptions {
    LaunchOptions {
        queue_capacity: Some(16),
        ..LaunchOptions::default()
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LONG, "{what} never came");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Instantiates the whole suite for one backend.
#[macro_export]
macro_rules! conformance {
    ($subject:ty: $($module:ident :: { $($test:ident),* $(,)? })*) => {
        $(mod $module {
            $(#[test]
            fn $test() {
                let _one = $crate::conformance::one_at_a_time();
                if let Some(reason) = <$subject as $crate::conformance::Subject>::missing() {
                    println!("skipped: {reason}");
                    return;
                }
                $crate::conformance::$module::$test::<$subject>();
                <$subject as $crate::conformance::Subject>::inspect();
            })*
        })*
    };
    // A backend whose blocks are threads of this process.
    ($subject:ty) => {
        $crate::conformance! { everywhere: $subject }

        mod shared_rings {
            $crate::conformance! { shared rings: $subject }
        }

        // What takes handlers that panic or wait for the host, or what only threads of this process can show.
        mod on_the_cpu {
            $crate::conformance! { $subject:
                messages::{
                    a_full_ring_gives_the_message_back_and_frees_its_slots,
                    a_handler_knows_its_surroundings,
                }
                sharing::{
                    a_late_reply_becomes_a_dead_letter,
                    calls_beyond_the_limit_are_refused,
                    auto_starves_nobody,
                    a_receive_of_no_time_succeeds_beside_a_busy_caller,
                }
                life::{
                    terminate_wakes_blocked_senders_and_receivers,
                }
                bridged::{
                    the_bridge_carries_between_devices_and_grids,
                    a_refused_connection_leaves_rings_alone,
                    many_ways_take_no_time,
                }
                clients::{
                    the_loop_gives_expired_messages_up,
                    lanes_get_their_turns_by_weight,
                    a_late_reply_to_a_client_becomes_a_dead_letter,
                    a_failure_reaches_every_client,
                    the_newest_value_survives_a_pause,
                    what_a_client_left_behind_is_accounted_for,
                }
                letters::{
                    a_late_reply_is_kept,
                    a_failed_kernels_requests_are_kept,
                }
                accounts::{ replies_that_wait_for_room_are_in_the_report }
                numbers::{
                    telemetry_equals_ground_truth,
                    metrics_show_signs_of_life,
                    configured_numbers_are_honoured,
                    several_devices_are_told_apart,
                }
                pipelines::{ many_replies_pass_kernels_of_one_thread }
                pipeline_ends::{
                    a_panic_in_any_stage_fails_that_kernel_alone,
                    replies_taken_after_the_end_count_as_delivered,
                    a_stuck_stage_holds_no_other_up,
                }
                foreign::{
                    a_panic_payload_whose_destructor_panics_fails_the_kernel_at_once,
                    a_panic_payload_whose_destructor_blocks_holds_nobody_up,
                    a_thread_local_destructor_that_blocks_does_not_delay_a_termination,
                    a_captured_value_that_panics_when_dropped_harms_nobody,
                    control_calls_from_a_kernels_own_handler_fail_at_once,
                    control_calls_from_a_handler_on_a_shared_thread_do_not_wait,
                    a_handler_may_drop_the_last_runtime,
                    a_handler_may_drop_the_last_runtime_while_its_kernel_is_terminated,
                    a_handler_that_calls_its_own_kernel_is_told_at_once,
                    a_thread_local_destructor_may_terminate_its_own_kernel,
                    a_stuck_handler_is_the_failure_of_its_own_kernel_alone,
                }
                faults::{
                    a_panic_fails_its_kernel_and_no_other,
                    a_panic_in_one_block_ends_the_whole_grid,
                    a_handler_that_never_returns_is_reported_in_time,
                    a_failed_launch_leaves_nothing_behind,
                    a_failed_kernel_that_nothing_refers_to_gives_everything_back,
                    panics_of_several_blocks_are_all_accounted_for,
                }
            }
        }
    };
    // A backend whose blocks run elsewhere.
    (on a device: $subject:ty) => {
        $crate::conformance! { everywhere: $subject }

        mod on_a_device {
            $crate::conformance! { $subject:
                bounds::{
                    a_read_beyond_the_end_gives_zero,
                    a_write_beyond_the_end_is_dropped,
                    no_block_reaches_the_state_of_another,
                    a_kernel_without_state_has_no_state_words,
                    a_reply_of_a_kind_that_does_not_exist_fails_its_kernel_alone,
                }
                faults::{ a_handler_that_replies_too_often_fails_its_kernel_and_no_other }
            }
        }
    };
    // A backend whose kernels can write into one another's rings.
    (shared rings: $subject:ty) => {
        $crate::conformance! { $subject:
            shared::{
                no_host_hop_lies_between_kernels_that_share_a_ring,
                rings_of_other_sizes_are_shared,
                kernels_that_cannot_share_a_ring_do_not,
            }
            bridged::{ a_ring_gives_way_to_the_bridge }
            pipelines::{
                a_pipeline_delivers_everything_once_and_in_order,
                what_travels_through_keeps_its_marks,
                a_pipeline_that_nobody_empties_holds_its_senders_back,
                types_are_translated_and_unknown_ones_are_errors,
                errors_of_every_stage_reach_the_end,
                sums_that_overflow_are_errors_behind_a_translation,
                connected_handles_say_so,
                what_cannot_be_connected_is_refused_and_changes_nothing,
                kernels_of_a_pipeline_wait_as_they_like,
                calls_through_a_pipeline_never_mix,
            }
            pipeline_ends::{
                connections_come_and_go_without_a_loss,
                stages_can_be_deactivated_at_any_time,
                stages_end_in_any_order_and_every_message_is_accounted_for,
                stages_end_under_load_in_any_order,
                the_place_of_a_kernel_that_ended_can_be_taken,
                a_drain_waits_for_the_whole_pipeline,
                what_lies_between_two_kernels_at_the_end_is_returned,
                pipelines_may_be_dropped_in_any_order,
            }
        }
    };
    // The same where they are not threads of this process.
    (shared rings on a device: $subject:ty) => {
        $crate::conformance! { shared rings: $subject }

        mod at_fault {
            $crate::conformance! { $subject:
                pipeline_ends::{ a_fault_in_any_stage_fails_that_kernel_alone }
            }
        }
    };
    // A backend whose kernels cannot.
    (no shared rings: $subject:ty) => {
        $crate::conformance! { $subject: shared::{ every_connection_is_carried } }
    };
    // A backend whose kernels can be traced.
    (traces: $subject:ty) => {
        $crate::conformance! { $subject:
            time::{
                a_kernel_is_traced_only_if_asked_to,
                a_trace_tells_when_a_message_was_sent_seen_and_done,
                one_message_in_n_is_traced_and_every_one_with_a_trace_id,
                the_latest_traces_are_kept_and_outlive_a_pause,
                a_message_that_ends_in_an_error_is_traced,
                handler_time_is_all_of_the_handlers_time,
            }
        }
    };
    // A backend whose kernels cannot be.
    (no traces: $subject:ty) => {
        $crate::conformance! { $subject: time::{ a_kernel_that_cannot_be_traced_says_so } }
    };
    (everywhere: $subject:ty) => {
        $crate::conformance! { $subject:
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
            bridged::{
                every_kernel_behind_gets_every_reply,
                several_kernels_feed_one,
                a_diamond_delivers_by_both_ways,
                a_full_kernel_behind_holds_the_first_back,
                connections_over_the_bridge_come_and_go,
                what_ends_leaves_the_rest_of_the_bridge,
                a_drain_waits_for_what_the_bridge_carries,
                calls_go_over_the_bridge,
                bridged_kernels_may_be_dropped_in_any_order,
                a_reply_of_a_grid_that_is_held_up_is_given_once,
                a_reply_that_went_one_way_is_no_callers,
                a_drain_does_not_wait_for_what_a_client_left,
                a_kernel_may_join_in_while_the_last_one_ends,
            }
            clients::{
                many_clients_of_many_kernels_lose_double_and_mix_nothing,
                a_second_client_may_come_at_any_time,
                calls_of_clients_never_mix,
                a_call_of_a_client_puts_other_replies_aside,
                a_client_that_reads_nothing_holds_up_nobody,
                credit_comes_back_whatever_the_kernel_replies,
                the_newest_reply_is_found_behind_one_of_another_type,
                urgent_messages_overtake_at_the_merge,
                without_room_a_client_does_what_its_policy_says,
                the_newest_value_wins,
                expired_messages_never_reach_the_kernel,
                what_waits_in_lanes_at_the_end_is_returned,
                deactivation_keeps_what_is_in_lanes,
                a_drain_delivers_what_is_in_lanes,
                terminate_wakes_clients,
                the_last_client_gives_the_kernel_back,
                clients_and_runtime_may_be_dropped_in_any_order,
                bad_client_options_are_refused,
                every_way_to_wait_serves_clients,
                the_bridge_merges_for_those_who_do_not_wait,
            }
            topics::{
                a_kernel_may_subscribe_to_a_topic,
                what_a_kernel_does_not_take_waits_in_its_subscription,
                a_drain_delivers_what_was_published,
                typed_topics_go_to_kernels_of_their_types,
            }
            accounts::{
                replies_received_after_the_end_are_delivered,
                clients_and_endpoints_receive_after_the_end,
                requests_sent_while_the_kernel_ends_are_in_the_report,
                a_reply_that_a_topic_cannot_take_is_booked_once,
            }
            letters::{
                what_is_queued_at_the_end_can_be_sent_again,
                letters_beyond_the_bound_are_counted,
                replies_that_nobody_takes_are_kept,
            }
            shared::{ a_bridge_that_sleeps_wakes_for_every_message }
            numbers::{
                many_launches_leave_nothing_behind,
                a_default_echo_takes_little_memory,
            }
            faults::{
                memory_that_is_not_there_is_an_error,
            }
            time::{
                what_happened_before_is_stamped_lower_across_kernels_and_clocks,
            }
        }
    };
}

//! Table tests of the four programs: packets through `BPF_PROG_TEST_RUN`, every rewritten byte,
//! every checksum, every counter and every flow looked at.
//!
//! Real interfaces, the real backend, the loaded programs; no traffic. The host lives in a
//! network namespace that the main thread enters, so tests run one after the other on it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by panicking")]

use std::process::ExitCode;

use anyhow::Result;
use family::{FAMILIES, Family};
use fixture::Fixture;
use libtest_mimic::{Arguments, Trial};
use netdp_tests::{bpf::Checksum, runtime::isolate};

mod aging;
mod apply;
mod datagram;
mod errors;
mod family;
mod fast;
mod fixture;
mod flows;
#[expect(dead_code, reason = "shared with the property test, which looks at more of a half")]
mod halves;
mod host;
mod hostile;
mod icmp_error;
mod journeys;
mod mapping;
mod nat;
mod neighbours;
mod policies;
mod standard;
mod walls;

/// Tests by name.
macro_rules! trials {
    ($($module:ident: $($name:ident),+;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), $module::$name)),+),+]
    };
}

/// A test's name and the test.
type Promise = (&'static str, fn(&mut Fixture) -> Result<()>);

const TRIALS: &[Promise] = trials! {
    family:
        parties_have_one_address_in_each_family,
        datagrams_of_both_families_are_sound;
    journeys:
        a_container_reaches_the_world_as_the_uplink,
        a_container_reaches_the_world_through_an_uplink_without_ethernet,
        a_fixed_source_address_is_kept,
        a_container_keeps_its_address_where_masquerade_is_off,
        a_published_port_answers_the_world,
        an_unprotected_network_is_dialled_directly,
        a_routed_network_is_dialled_at_published_ports_and_pinged,
        a_published_port_answers_other_networks,
        a_published_port_answers_its_own_network,
        a_published_port_answers_its_own_network_without_icc,
        a_container_reaches_its_own_published_port_as_the_gateway;
    fast:
        a_flow_is_looked_at_once_a_second,
        the_stack_answers_what_it_has_to,
        a_closed_way_is_left_at_once,
        a_new_rule_cuts_a_flow_on_the_fast_path,
        a_container_that_is_gone_gets_nothing,
        the_fast_path_does_what_the_stack_would;
    walls:
        networks_are_walls,
        internal_and_isolated_networks_have_no_way_out,
        an_internal_network_stays_closed_in_every_gateway_mode,
        the_world_reaches_no_container_address,
        the_world_is_not_inside,
        the_host_becomes_no_router_for_others,
        a_container_is_only_itself,
        a_spoofed_first_fragment_teaches_nothing,
        a_container_claims_only_its_own_address_by_arp,
        other_families_stay_out,
        multicast_and_broadcast_stay_in_the_network,
        a_container_is_no_dhcp_server,
        a_protocol_that_cannot_be_translated_stays_in,
        a_packet_at_the_end_of_its_life_is_the_stacks_to_answer,
        what_has_no_route_ends_at_this_hop,
        only_the_host_and_flows_enter_a_network,
        nothing_of_a_container_leaves_without_a_flow,
        only_what_can_open_a_flow_does;
    nat:
        a_port_outside_the_ephemeral_range_is_kept,
        a_port_in_the_ephemeral_range_moves_to_the_reserved_one,
        identifiers_of_pings_come_from_the_reserved_range,
        two_containers_with_one_port_get_two,
        a_published_port_is_never_a_source,
        a_port_of_a_host_socket_is_never_a_source,
        a_port_that_a_program_asks_for_is_not_chosen,
        without_a_free_port_a_new_flow_is_refused,
        what_has_no_ports_is_given_none,
        without_a_source_address_nothing_leaves,
        clients_that_collide_behind_a_published_port_stay_apart,
        containers_that_collide_behind_a_published_port_stay_apart,
        checksums_hold_for_every_carry,
        a_udp_checksum_never_becomes_zero,
        a_packet_too_large_for_its_exit_is_the_stacks_to_answer;
    mapping:
        an_endpoints_port_has_one_port_outside,
        a_mapped_port_is_nobody_elses,
        strangers_come_in_where_that_is_asked_for,
        a_socket_of_the_host_comes_before_a_mapping,
        a_mapping_lives_as_long_as_something_leaves_by_it,
        a_successor_inherits_no_mapping,
        a_reset_out_of_the_window_ends_no_mapped_flow;
    flows:
        a_tcp_flow_shows_its_state,
        a_syn_on_an_ending_flow_starts_afresh,
        only_a_reset_in_the_window_ends_a_flow,
        a_fin_out_of_the_window_ends_nothing,
        a_connection_survives_the_loss_of_its_flow,
        a_full_table_refuses_new_flows_and_keeps_old_ones,
        a_large_table_fills,
        what_a_set_has_no_room_for_stands_beside_it,
        a_table_that_was_not_finished_is_begun_again,
        a_successor_inherits_no_flow,
        an_unpublished_port_is_closed_to_its_flows,
        an_unpublished_port_of_a_routed_network_is_closed_to_its_flows,
        a_port_published_elsewhere_leads_there_at_once,
        other_ports_changes_leave_a_flow_alone,
        flows_from_a_lost_address_of_the_host_end,
        a_reopened_backend_keeps_flows_and_programs,
        a_flow_takes_no_more_memory_than_conntracks,
        two_cpus_that_open_one_flow_agree,
        two_cpus_that_open_the_last_flow_agree;
    aging:
        idle_flows_are_collected_after_the_timeout_of_their_state,
        a_packet_in_either_direction_keeps_a_flow,
        only_idle_flows_are_collected,
        without_an_agent_new_flows_see_to_others,
        the_hand_goes_round_the_whole_table,
        a_table_that_grows_is_looked_through,
        an_unanswered_flow_makes_room_in_a_full_table,
        an_endpoint_opens_as_many_flows_as_its_network_allows,
        an_account_follows_the_flows_of_its_endpoint;
    neighbours:
        link_local_addresses_follow_from_macs,
        a_container_solicits_and_advertises_only_itself,
        options_of_neighbour_discovery_are_read_to_the_end,
        a_container_is_no_router,
        without_an_address_a_container_only_prepares_to_have_one,
        link_local_addresses_reach_the_link,
        extension_headers_are_stepped_over_up_to_six,
        what_has_a_routing_header_is_not_translated;
    policies:
        the_examples_of_docker_user_hold,
        the_first_rule_that_matches_decides,
        a_new_rule_cuts_the_flow_at_its_next_packet,
        a_new_rule_cuts_the_answers_too,
        a_flow_that_lost_its_approval_gets_no_fragment_through,
        rules_reach_other_networks_but_not_members,
        a_hairpin_flow_is_judged_by_the_dialling_container;
    apply:
        publishing_a_port_is_at_most_two_writes,
        applying_twice_writes_nothing,
        an_entry_deleted_behind_our_back_is_found_and_put_back,
        an_entry_added_behind_our_back_is_found_and_removed,
        an_uplink_is_no_way_out_before_it_has_its_programs,
        a_container_that_goes_leaves_nothing;
    errors:
        errors_about_outgoing_packets_reach_the_container,
        errors_of_the_path_carry_its_mtu,
        errors_about_answers_reach_the_container,
        errors_of_the_container_leave_as_the_hosts,
        errors_find_their_way_across_networks,
        errors_find_their_way_within_a_network,
        errors_open_and_refresh_nothing,
        errors_about_others_flows_are_forgeries,
        errors_that_quote_too_little_are_the_hosts,
        errors_quote_as_much_as_they_like,
        errors_quote_options_and_first_fragments,
        errors_that_quote_later_fragments_are_the_hosts,
        errors_of_the_host_quote_what_its_client_sent,
        errors_of_the_host_about_others_stay_as_they_are;
    hostile:
        every_prefix_of_a_packet_is_survived,
        every_value_of_a_header_byte_is_survived,
        random_mutations_are_survived;
};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Namespaces belong to threads, and this one is in the right place.
    arguments.test_threads = Some(1);
    if !arguments.list
        && let Err(error) = isolate()
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut trials = Vec::new();
    for &(name, test) in TRIALS {
        for &family in FAMILIES {
            for (suffix, checksum) in CHECKSUMS {
                if !is_for(name, family, checksum) {
                    continue;
                }
                let name = format!("{name}/{}{suffix}", family.name());
                trials.push(Trial::test(name, move || {
                    Fixture::share(family, checksum, test)
                        .map_err(|error| format!("{error:#}").into())
                }));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What a device may say of a packet's checksum, and what that adds to a test's name.
const CHECKSUMS: [(&str, Checksum); 2] =
    [("", Checksum::Unknown), ("/complete", Checksum::Complete)];

/// Tests about what IPv4 alone has, or about no packet.
const IPV4_ONLY: [&str; 3] = [
    "walls::a_container_claims_only_its_own_address_by_arp",
    "walls::other_families_stay_out",
    "family::parties_have_one_address_in_each_family",
];

/// Whether a test runs for a family and a sort of checksum.
fn is_for(name: &str, family: Family, checksum: Checksum) -> bool {
    // No veth gives a sum of the whole packet with what a container sends, so there is none to keep
    // when an error takes the packet's place.
    let refusals = [
        "nat::without_a_free_port_a_new_flow_is_refused",
        "mapping::a_mapped_port_is_nobody_elses",
        "nat::what_has_no_ports_is_given_none",
        "aging::an_endpoint_opens_as_many_flows_as_its_network_allows",
    ];
    if checksum == Checksum::Complete && refusals.contains(&name) {
        return false;
    }
    (family == Family::V4 || !IPV4_ONLY.contains(&name))
        && (family == Family::V6 || !name.starts_with("neighbours::"))
        && (checksum == Checksum::Unknown
            || !["hostile::", "family::", "apply::"].iter().any(|group| name.starts_with(group)))
}

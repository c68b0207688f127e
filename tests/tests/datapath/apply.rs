//! The backend's side: how many writes a change costs, drift and repair.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map};
use netdp::model::Protocol;
use netdp_common::{
    addr::{Be32, Be128},
    interface::Interface,
    publish::{Published, PublishedKey},
};

use crate::{
    family::Family,
    fixture::{Fixture, id_of},
    standard::published,
};

pub(crate) fn publishing_a_port_is_at_most_two_writes(fixture: &mut Fixture) -> Result<()> {
    let (key, target) =
        published(fixture.family, (Ipv4Addr::UNSPECIFIED, 9000), Protocol::Tcp, ("a2", 90));
    let writes = fixture.apply(|program| {
        program.published.insert(key, target);
    })?;
    ensure!((1..=2).contains(&writes), "{writes} writes for one more port");
    let writes = fixture.apply(|program| {
        program.published.remove(key);
    })?;
    ensure!((1..=2).contains(&writes), "{writes} writes for one port less");
    Ok(())
}

pub(crate) fn applying_twice_writes_nothing(fixture: &mut Fixture) -> Result<()> {
    ensure!(fixture.apply(|_| {})? == 0, "a second apply wrote something");
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
    ensure!(fixture.apply(|_| {})? == 0, "an apply after a check wrote something");
    Ok(())
}

/// Deletes an entry of a hash map; returns its key.
fn delete_one<const KEY: usize, const VALUE: usize>(
    fixture: &Fixture,
    name: &str,
) -> Result<Vec<u8>> {
    let mut map: HashMap<_, [u8; KEY], [u8; VALUE]> =
        Map::HashMap(fixture.map(name)?).try_into()?;
    let key = map.keys().next().with_context(|| format!("find an entry of {name}"))??;
    map.remove(&key)?;
    Ok(key.to_vec())
}

/// Makes an address one of the host's.
fn add_local<const SIZE: usize>(fixture: &Fixture, name: &str, address: [u8; SIZE]) -> Result<()> {
    let mut map: HashMap<_, [u8; SIZE], u32> = Map::HashMap(fixture.map(name)?).try_into()?;
    Ok(map.insert(address, 1, 0)?)
}

pub(crate) fn an_entry_deleted_behind_our_back_is_found_and_put_back(
    fixture: &mut Fixture,
) -> Result<()> {
    let published = match fixture.family {
        Family::V4 => delete_one::<
            { size_of::<PublishedKey<Be32>>() },
            { size_of::<Published<Be32>>() },
        >(fixture, "PUBLISHED4")?,
        Family::V6 => delete_one::<
            { size_of::<PublishedKey<Be128>>() },
            { size_of::<Published<Be128>>() },
        >(fixture, "PUBLISHED6")?,
    };
    let drift = fixture.drift()?;
    ensure!(drift.len() == 1, "key {published:02x?} deleted, drift {drift:?}");
    ensure!(drift[0].what.contains("is missing"), "{drift:?}");
    ensure!(fixture.apply(|_| {})? == 1, "repairing one entry is one write");
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
    Ok(())
}

pub(crate) fn an_entry_added_behind_our_back_is_found_and_removed(
    fixture: &mut Fixture,
) -> Result<()> {
    match fixture.family.address(Ipv4Addr::new(8, 8, 8, 8)) {
        IpAddr::V4(address) => add_local(fixture, "LOCAL4", address.octets())?,
        IpAddr::V6(address) => add_local(fixture, "LOCAL6", address.octets())?,
    }
    let drift = fixture.drift()?;
    ensure!(drift.len() == 1 && drift[0].what.contains("should not be there"), "{drift:?}");
    ensure!(fixture.apply(|_| {})? == 1, "repairing one entry is one write");
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
    Ok(())
}

/// Between the entry and the program, containers' packets would leave by it untranslated.
pub(crate) fn an_uplink_is_no_way_out_before_it_has_its_programs(
    fixture: &mut Fixture,
) -> Result<()> {
    /// No interface has it, so no program can be attached there.
    const NOWHERE: u32 = 0x7fff_ffff;
    let up0 = fixture.ifindex("up0");
    let attached = fixture.apply(|program| {
        let uplink = program.uplinks[&up0];
        program.uplinks.insert(NOWHERE, uplink);
    });
    ensure!(attached.is_err(), "a program was attached to nowhere");
    let interfaces: HashMap<_, u32, [u8; size_of::<Interface>()]> =
        Map::HashMap(fixture.map("INTERFACE")?).try_into()?;
    ensure!(interfaces.get(&NOWHERE, 0).is_err(), "it has an entry");
    fixture.apply(|program| {
        program.uplinks.remove(&NOWHERE);
    })?;
    ensure!(fixture.drift()?.is_empty(), "something of it stays");
    Ok(())
}

pub(crate) fn a_container_that_goes_leaves_nothing(fixture: &mut Fixture) -> Result<()> {
    fixture.apply(|program| {
        program.endpoints.remove(&id_of("b1"));
        program.published.retain(|_, target| target.endpoint != id_of("b1"));
    })?;
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
    Ok(())
}

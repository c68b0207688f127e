//! The backend's side: how many writes a change costs, drift and repair.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use netdp::model::Protocol;

use crate::fixture::{Fixture, id_of, published};

pub(crate) fn publishing_a_port_is_at_most_two_writes(fixture: &mut Fixture) -> Result<()> {
    let (key, target) =
        published(fixture.family, Ipv4Addr::UNSPECIFIED, 9000, Protocol::Tcp, "a2", 90);
    let writes = fixture.apply(|program| {
        program.published.insert(key, target);
    })?;
    ensure!((1..=2).contains(&writes), "{writes} writes for one more port");
    let writes = fixture.apply(|program| {
        program.published.remove(&key);
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

pub(crate) fn an_entry_deleted_behind_our_back_is_found_and_put_back(
    fixture: &mut Fixture,
) -> Result<()> {
    let endpoints: Vec<u8> = {
        let data = MapData::from_pin(fixture.map_path("PUBLISHED4"))?;
        let mut map: HashMap<_, [u8; 8], [u8; 12]> = Map::HashMap(data).try_into()?;
        let key = map.keys().next().context("find an entry of PUBLISHED4")??;
        map.remove(&key)?;
        key.to_vec()
    };
    let drift = fixture.drift()?;
    ensure!(drift.len() == 1, "key {endpoints:02x?} deleted, drift {drift:?}");
    ensure!(drift[0].what.contains("is missing"), "{drift:?}");
    ensure!(fixture.apply(|_| {})? == 1, "repairing one entry is one write");
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
    Ok(())
}

pub(crate) fn an_entry_added_behind_our_back_is_found_and_removed(
    fixture: &mut Fixture,
) -> Result<()> {
    {
        let data = MapData::from_pin(fixture.map_path("LOCAL4"))?;
        let mut map: HashMap<_, [u8; 4], u32> = Map::HashMap(data).try_into()?;
        map.insert([8, 8, 8, 8], 1, 0)?;
    }
    let drift = fixture.drift()?;
    ensure!(drift.len() == 1 && drift[0].what.contains("should not be there"), "{drift:?}");
    ensure!(fixture.apply(|_| {})? == 1, "repairing one entry is one write");
    let drift = fixture.drift()?;
    ensure!(drift.is_empty(), "{drift:?}");
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

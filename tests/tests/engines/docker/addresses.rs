//! Addresses that netdp chooses, for networks with its IPAM driver.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netdp_tests::probe::expect_same;
use serde_json::json;

use super::Scene;

pub(super) fn addresses_are_chosen_by_netdp(scene: &Scene) -> Result<()> {
    let create = "network create --driver netdp --ipam-driver netdp";
    let options = "--subnet 172.28.0.0/24 --ip-range 172.28.0.128/25 \
                   --aux-address router=172.28.0.129";
    scene.docker(&format!("{create} {options} lab"))?;
    let join = |name: &'static str, options: &str| -> Result<IpAddr> {
        let container = scene.run(name, &format!("--network lab {options}"))?;
        scene.address(&container, "lab")
    };
    let expected = |last: u8| IpAddr::from([172, 28, 0, last]);
    expect_same("the first address", &join("one", "")?, &expected(128))?;
    expect_same("the next one", &join("two", "")?, &expected(130))?;
    let network = scene.network("lab")?;
    expect_same("gateway", &network["gateways"], &json!(["172.28.0.1"]))?;
    expect_same("reserved", &network["reserved"], &json!(["172.28.0.129"]))?;
    // The next agent gives none of them to anybody else.
    scene.lab.agent()?.kill9()?;
    scene.lab.agent()?.start()?;
    scene.docker("rm --force one")?;
    let three = join("three", "")?;
    ensure!(![129, 130].map(expected).contains(&three), "three has {three}");
    let fixed = join("fixed", "--ip 172.28.0.9")?;
    expect_same("the address asked for", &fixed, &expected(9))?;
    // Networks that leave it open are beside each other and beside what the host has.
    let mut subnets = BTreeSet::new();
    for name in ["first", "second"] {
        scene.docker(&format!("{create} --ipv6 {name}"))?;
        let network = scene.network(name)?;
        let list = network["subnets"].as_array().context("read the subnets")?;
        expect_same("subnets", &list.len(), &2)?;
        subnets.extend(list.iter().map(ToString::to_string));
    }
    expect_same("different subnets", &subnets.len(), &4)
}

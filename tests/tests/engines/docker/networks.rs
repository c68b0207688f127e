//! Networks of Docker's: who reaches whom, by what address and by what name.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netdp_tests::net::IPV6;
use netdp_tests::probe::expect_same;
use serde_json::json;

use super::Scene;

pub(super) fn what_leaves_is_masqueraded(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp web")?;
    let web = scene.run("web1", "--network web")?;
    let _tcp = scene.lab.outside().tcp_server("outside", (net.outside, 7))?;
    let _udp = scene.lab.outside().udp_server("outside", (net.outside, 7))?;
    web.namespace.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    web.namespace.udp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    web.namespace.ping(net.outside).replied()
}

pub(super) fn networks_are_apart(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp one")?;
    scene.docker("network create --driver netdp two")?;
    let a = scene.run("a1", "--network one")?;
    let b = scene.run("b1", "--network two")?;
    let a2 = scene.run("a2", "--network one")?;
    let address = scene.address(&a, "one")?;
    let _server = a.namespace.tcp_server("a1", (address, 80))?;
    a2.namespace.tcp((address, 80)).exchange()?.by("a1")?;
    let before = scene.lab.counters()?;
    b.namespace.tcp((address, 80)).dropped()?;
    scene.lab.counters()?.expect_moved(&before, "isolation", &[])
}

pub(super) fn internal_network_has_no_way_out(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp --internal inside")?;
    let a = scene.run("a1", "--network inside --publish 8080:80")?;
    let b = scene.run("b1", "--network inside")?;
    let address = scene.address(&a, "inside")?;
    let _server = a.namespace.tcp_server("a1", (address, 80))?;
    b.namespace.tcp((address, 80)).exchange()?.by("a1")?;
    // As with Docker's own: the port is asked for, and nothing is there for it.
    scene.lab.outside().tcp((net.host, 8080)).refused()?;
    let routes = a.namespace.ip_json(&["route", "show", "default"])?;
    expect_same("default routes", &routes, &json!([]))?;
    ensure!(scene.lab.host().links()?.iter().all(|link| link != "docker_gwbridge"));
    Ok(())
}

pub(super) fn container_is_in_two_networks(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp front")?;
    scene.docker("network create --driver netdp --internal back")?;
    let app = scene.run("app1", "--network back --network front --publish 8080:80")?;
    let db = scene.run("db1", "--network back")?;
    let (front, back) = (scene.address(&app, "front")?, scene.address(&app, "back")?);
    let _front = app.namespace.tcp_server("app1", (front, 80))?;
    let _back = app.namespace.tcp_server("app1", (back, 81))?;
    scene.lab.outside().tcp((net.host, 8080)).exchange()?.by("app1")?;
    db.namespace.tcp((back, 81)).exchange()?.by("app1")?;
    let _outside = scene.lab.outside().tcp_server("outside", (net.outside, 7))?;
    app.namespace.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    // Its way out goes, then comes back while it runs.
    scene.docker("network disconnect front app1")?;
    scene.lab.outside().tcp((net.host, 8080)).refused()?;
    db.namespace.tcp((back, 81)).exchange()?.by("app1")?;
    scene.docker(&format!("network connect --ip {front} front app1")).map(drop).or_else(|_| {
        // Docker takes a fixed address from networks with a subnet of the user's only.
        scene.docker("network connect front app1").map(drop)
    })?;
    let front = scene.address(&app, "front")?;
    let _front = app.namespace.tcp_server("app1 again", (front, 82))?;
    app.namespace.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    Ok(())
}

pub(super) fn ports_follow_the_gateway(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp one")?;
    scene.docker("network create --driver netdp two")?;
    let options = "--network name=one --network name=two,gw-priority=1 --publish 8080:80";
    let web = scene.run("web1", options)?;
    let (one, two) = (scene.address(&web, "one")?, scene.address(&web, "two")?);
    let _one = web.namespace.tcp_server("by one", (one, 80))?;
    let by_two = web.namespace.tcp_server("by two", (two, 80))?;
    let outside = scene.lab.outside();
    outside.tcp((net.host, 8080)).exchange()?.by("by two")?.saw_client_at(net.outside)?;
    scene.docker("network disconnect two web1")?;
    drop(by_two);
    outside.tcp((net.host, 8080)).exchange()?.by("by one")?.saw_client_at(net.outside)?;
    scene.docker("network connect --gw-priority 2 two web1")?;
    let two = scene.address(&web, "two")?;
    let _two = web.namespace.tcp_server("by two again", (two, 80))?;
    outside.tcp((net.host, 8080)).exchange()?.by("by two again")?.saw_client_at(net.outside)?;
    Ok(())
}

pub(super) fn addresses_are_as_asked(scene: &Scene) -> Result<()> {
    scene.docker(
        "network create --driver netdp --subnet 172.28.0.0/24 --gateway 172.28.0.254 web",
    )?;
    let options = "--network web --ip 172.28.0.77 --mac-address 02:42:00:00:00:77";
    let web = scene.run("web1", options)?;
    let other = scene.run("web2", "--network web")?;
    let expected: IpAddr = [172, 28, 0, 77].into();
    expect_same("address", &scene.address(&web, "web")?, &expected)?;
    expect_same("MAC", &web.namespace.mac("eth0")?, &[2, 0x42, 0, 0, 0, 0x77])?;
    let network = scene.network("web")?;
    expect_same("gateway", &network["gateways"], &json!(["172.28.0.254"]))?;
    let mac = scene.field(&other, "web", "MacAddress")?;
    expect_same("MAC that netdp chose", &network["endpoints"][1]["mac"], &json!(mac))?;
    let _server = web.namespace.tcp_server("web1", (expected, 80))?;
    let seen = other.namespace.tcp((expected, 80)).exchange()?;
    seen.by("web1")?.saw_client_at(scene.address(&other, "web")?)?;
    Ok(())
}

pub(super) fn ipv6_works_like_ipv4(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp --ipv6 web")?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let other = scene.run("web2", "--network web")?;
    let address = |container| -> Result<IpAddr> {
        scene.field(container, "web", "GlobalIPv6Address")?.parse().context("read an address")
    };
    let (there, here) = (address(&web)?, address(&other)?);
    let _server = web.namespace.tcp_server("web1", (there, 80))?;
    other.namespace.tcp((there, 80)).exchange()?.by("web1")?.saw_client_at(here)?;
    let seen = scene.lab.outside().tcp((IPV6.host, 8080)).exchange()?;
    seen.by("web1")?.saw_client_at(IPV6.outside)?;
    for destination in [IPV6.host, IPV6.loopback] {
        scene.lab.host().tcp((destination, 8080)).exchange()?.by("web1")?;
    }
    let _outside = scene.lab.outside().tcp_server("outside", (IPV6.outside, 7))?;
    web.namespace.tcp((IPV6.outside, 7)).exchange()?.saw_client_at(IPV6.host)?;
    // The same without IPv4.
    scene.docker("network create --driver netdp --ipv4=false --ipv6 alone")?;
    let alone = scene.run("alone1", "--network alone --publish 8081:80")?;
    let there: IpAddr = scene.field(&alone, "alone", "GlobalIPv6Address")?.parse()?;
    let _server = alone.namespace.tcp_server("alone1", (there, 80))?;
    scene.lab.outside().tcp((IPV6.host, 8081)).exchange()?.by("alone1")?;
    alone.namespace.tcp((IPV6.outside, 7)).exchange()?.saw_client_at(IPV6.host)?;
    Ok(())
}

pub(super) fn names_are_resolved(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp web")?;
    let db = scene.run("db1", "--network web --network-alias database")?;
    scene.run("web1", "--network web")?;
    let address = scene.address(&db, "web")?;
    for name in ["db1", "database"] {
        let said = scene.docker(&format!("exec web1 /bin/busybox nslookup {name} 127.0.0.11"))?;
        ensure!(said.contains(&address.to_string()), "nslookup {name}: {said}");
    }
    Ok(())
}

pub(super) fn options_are_dockers_and_netdps(scene: &Scene) -> Result<()> {
    let options = "--opt netdp.name=shop --opt netdp.endpoint_flows=1000 \
                   --opt com.docker.network.bridge.name=br-shop \
                   --opt com.docker.network.driver.mtu=1400 \
                   --opt com.docker.network.bridge.enable_icc=false";
    scene.docker(&format!("network create --driver netdp {options} shop"))?;
    let web = scene.run("web1", "--network name=shop,driver-opt=netdp.name=till")?;
    let shop = scene.lab.json(&["network", "inspect", "shop"])?[0].take();
    expect_same("bridge", &shop["bridge"], &json!("br-shop"))?;
    expect_same("MTU", &shop["mtu"], &json!(1400))?;
    expect_same("flows", &shop["endpoint_flows"], &json!(1000))?;
    expect_same("icc", &shop["icc"], &json!(false))?;
    expect_same("endpoint", &shop["endpoints"][0]["name"], &json!("till"))?;
    let links = web.namespace.ip_json(&["link", "show", "dev", "eth0"])?;
    expect_same("MTU inside", &links[0]["mtu"], &json!(1400))?;
    let said = scene.docker_fails("network create --driver netdp --opt netdp.speed=high fast")?;
    ensure!(said.contains("netdp.speed"), "what Docker says does not name the option: {said}");
    let said = scene.docker_fails("network create --driver netdp --subnet 10.0.0.0/16 wide")?;
    ensure!(said.contains("overlaps"), "what Docker says does not name the subnet: {said}");
    Ok(())
}

pub(super) fn web_app_and_database(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp --ipv6 front")?;
    scene.docker("network create --driver netdp --internal back")?;
    let db = scene.run("db", "--network back")?;
    let app = scene.run("app", "--network front --network back")?;
    let web = scene.run("web", "--network front --publish 443:8443 --publish 80:8080")?;
    let at = |container, network| scene.address(container, network);
    let (db_back, app_back) = (at(&db, "back")?, at(&app, "back")?);
    let (app_front, web_front) = (at(&app, "front")?, at(&web, "front")?);
    let _db = db.namespace.tcp_server("db", (db_back, 5432))?;
    let _app = app.namespace.tcp_server("app", (app_front, 3000))?;
    let _web = web.namespace.tcp_server("web", (web_front, 8080))?;
    scene.lab.outside().tcp((net.host, 80)).exchange()?.by("web")?.saw_client_at(net.outside)?;
    web.namespace.tcp((app_front, 3000)).exchange()?.by("app")?.saw_client_at(web_front)?;
    app.namespace.tcp((db_back, 5432)).exchange()?.by("db")?.saw_client_at(app_back)?;
    web.namespace.tcp((db_back, 5432)).dropped()?;
    // Nothing routes out of the internal network.
    let _outside = scene.lab.outside().tcp_server("outside", (net.outside, 7))?;
    ensure!(db.namespace.tcp((net.outside, 7)).exchange().is_err(), "the database gets out");
    for (from, name) in [("web", "app"), ("app", "db")] {
        scene.docker(&format!("exec {from} /bin/busybox nslookup {name} 127.0.0.11"))?;
    }
    Ok(())
}

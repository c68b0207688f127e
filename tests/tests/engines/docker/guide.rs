//! docs/docker.md, word by word: what it tells to type works.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::backend::{Backend, Firewall};
use netdp_tests::docker::Installation;
use netdp_tests::namespace::Namespace;
use netdp_tests::probe::PATIENCE;
use netdp_tests::runtime::poll_until;

use super::Scene;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/docker.md");

/// The lines of the page's code that stand under a mark.
fn lines(mark: &str) -> Result<Vec<String>> {
    let page = std::fs::read_to_string(PAGE).with_context(|| format!("read {PAGE}"))?;
    let mark_line = format!("<!-- {mark} -->\n");
    let parts = page.split(&mark_line).skip(1);
    let parts = parts.filter_map(|part| part.split("<!-- end -->").next());
    let lines: Vec<_> = parts.flat_map(str::lines).map(str::to_owned).collect();
    let lines: Vec<_> = lines.into_iter().filter(|line| !line.starts_with("```")).collect();
    ensure!(!lines.is_empty(), "nothing is marked as {mark} in {PAGE}");
    Ok(lines)
}

/// The words of a line as a shell reads them, as far as the page goes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('"').enumerate() {
        match index % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

/// Does what a line of the page says, on the host.
fn follow(scene: &Scene, line: &str) -> Result<()> {
    let words = words(line.trim_start_matches("sudo "));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match &words[..] {
        ["docker", arguments @ ..] => scene.docker.run(arguments).map(drop),
        ["netdp", arguments @ ..] => scene.lab.netdp(arguments).map(drop),
        ["curl", url] => fetch(scene.lab.host(), url),
        _ => bail!("the page says {line:?}, which this test can't do"),
    }
}

/// Gets the page that the image serves; its server may need a moment.
pub(super) fn fetch(client: &Namespace, url: &str) -> Result<()> {
    let busybox = Installation::find()?.program("bin/busybox");
    let busybox = busybox.to_str().context("name busybox")?;
    poll_until(PATIENCE, "the page", || {
        let said = client.output(busybox, &["wget", "-T", "1", "-q", "-O", "-", url])?;
        Ok((said.status.success() && said.stdout == b"hello\n").then_some(()))
    })
    .with_context(|| format!("fetch {url}"))
}

pub(super) fn guide_does_what_it_says(scene: &Scene) -> Result<()> {
    for line in lines("tested")? {
        follow(scene, &line).with_context(|| line.clone())?;
    }
    fetch(scene.lab.outside(), "http://10.0.0.2:8080/")?;
    fetch(scene.lab.outside(), "http://10.0.0.2:8081/")
}

/// A daemon that makes rules of its own, as on a host that has Docker already.
pub(super) fn host_moves_network_by_network(_: &Scene) -> Result<()> {
    let scene = Scene::start(Backend::Ebpf, Firewall::Iptables)?;
    let result = move_over_and_back(&scene).with_context(|| scene.docker.log_tail());
    scene.lab.explain(result)
}

fn move_over_and_back(scene: &Scene) -> Result<()> {
    let page = "http://10.0.0.2:8080/";
    let outside = scene.lab.outside();
    let site = "run --detach --name site --publish 8080:80";
    scene.docker("network create old")?;
    scene.docker(&format!("{site} --network old nginx"))?;
    fetch(outside, page)?;
    // Beside each other.
    scene.docker("network create --driver netdp beside")?;
    scene.docker("run --detach --name two --network beside --publish 8082:80 nginx")?;
    fetch(outside, "http://10.0.0.2:8082/")?;
    fetch(outside, page)?;
    for line in lines("moving")? {
        follow(scene, &line).with_context(|| line.clone())?;
    }
    fetch(outside, page)?;
    fetch(scene.lab.host(), "http://127.0.0.1:8080/")?;
    // And back.
    scene.docker("rm --force site two")?;
    scene.docker("network rm new beside")?;
    scene.docker("network create --driver bridge old")?;
    scene.docker(&format!("{site} --network old nginx"))?;
    fetch(outside, page)?;
    scene.docker("rm --force site")?;
    scene.lab.netdp(&["purge"])?;
    let bpffs = scene.lab.bpffs();
    ensure!(!Path::new(&bpffs).join("netdp").exists(), "purge leaves {}", bpffs.display());
    Ok(())
}

//! Frames that make no sense, through every program at every kind of interface: whatever comes,
//! each verdict is one of ours, every drop is counted, nothing is rewritten but what translation
//! may, and checksums stay as right or wrong as they were.
//!
//! `NETDP_FUZZ_SECONDS` says how long, `NETDP_SEED` repeats a run, and `NETDP_FUZZ_KEEP` names a
//! file to which inputs are added that led to something new. Those in `tests/corpus` are replayed.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    env,
    fs::File,
    io::Write,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use family::ipv6;
use fixture::{
    A, At, B, Fixture, ICC_OFF, TCX_DROP, TCX_NEXT, TCX_REDIRECT, UNPROTECTED, address, bridge_mac,
    hex, host_in, mac,
};
use libtest_mimic::{Arguments, Trial};
use netdp::{
    dataplane::{Count, Dataplane},
    model::NetworkId,
};
use netdp_common::counter::Reason;
use netdp_tests::runtime::{isolate, seed};
use seeds::{Random, SHORTEST, mutate};

#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/datagram.rs"]
mod datagram;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/family.rs"]
mod family;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/fixture.rs"]
mod fixture;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/halves.rs"]
mod halves;
#[path = "../datapath/host.rs"]
mod host;
mod oracle;
mod seeds;
#[path = "../datapath/standard.rs"]
mod standard;

const ETHERNET_BYTES: usize = 14;
/// How long mutations go on where nobody says.
const SECONDS: u64 = 15;
/// What is longer says no more and is not kept.
const KEPT_BYTES: usize = 128;
/// Inputs that led to something new, by line; what stands behind a # is for people.
const CORPUS: &str = include_str!("../../corpus/frames.hex");

/// A test's name and the test.
type Promise = (&'static str, fn() -> Result<()>);

/// A program at an interface.
#[derive(Clone, Copy)]
struct Place {
    at: At,
    /// Offset of the IP header.
    ip: usize,
    /// The container that sends here.
    sender: Option<&'static str>,
    /// The network that packets leave here without a container's address.
    leaves: Option<NetworkId>,
}

/// Where a1 is among [`places`].
const A1: usize = 0;

fn places() -> Vec<Place> {
    let place = |at, ip| Place { at, ip, sender: None, leaves: None };
    let sent_by =
        |name| Place { sender: Some(name), ..place(fixture::from_container(name), ETHERNET_BYTES) };
    let out = |uplink, ip| Place {
        leaves: Some(A),
        ..place(fixture::to_uplink(uplink, Some("br-a")), ip)
    };
    vec![
        sent_by("a1"),
        sent_by("b1"),
        sent_by("c1"),
        place(fixture::from_uplink("up0"), ETHERNET_BYTES),
        place(fixture::from_uplink("tun0"), 0),
        place(fixture::into_network(A, Some("up0")), ETHERNET_BYTES),
        place(fixture::into_network(A, Some("br-b")), ETHERNET_BYTES),
        place(fixture::into_network(A, None), ETHERNET_BYTES),
        out("up0", ETHERNET_BYTES),
        out("tun0", 0),
        place(fixture::to_uplink("up0", None), ETHERNET_BYTES),
    ]
}

/// What a frame led to at one place: verdict, what was counted, rewritten or not, what it is.
type Effect = (usize, i32, Vec<(Option<NetworkId>, Reason)>, bool, (u8, u8, bool));

/// The programs, and what they are known to do.
struct Fuzzer {
    fixture: Fixture,
    places: Vec<Place>,
    counters: Vec<Count>,
    halves: usize,
    known: BTreeSet<Effect>,
    runs: u64,
}

impl Fuzzer {
    fn new() -> Result<Self> {
        let mut fixture = Fixture::new(4096)?;
        fixture.apply(|program| {
            // Few, because all their counters are read after each run.
            let kept = [A, B, ICC_OFF, UNPROTECTED];
            program.networks.retain(|id, _| kept.contains(id));
            program.endpoints.retain(|_, endpoint| kept.contains(&endpoint.network));
            program.published.retain(|_, target| program.endpoints.contains_key(&target.endpoint));
        })?;
        let mut fuzzer = Self {
            fixture,
            places: places(),
            counters: Vec::new(),
            halves: 0,
            known: BTreeSet::new(),
            runs: 0,
        };
        fuzzer.restore()?;
        Ok(fuzzer)
    }

    /// Empties the flow table but for the flows that frames are about.
    fn restore(&mut self) -> Result<()> {
        self.fixture.remove_flows()?;
        let openers = seeds::openers();
        for (interface, opener) in &openers {
            let at = match *interface {
                "up0" => fixture::from_uplink("up0"),
                container => fixture::from_container(container),
            };
            self.fixture.run(at, opener)?;
        }
        self.counters = self.fixture.backend().counters()?;
        self.halves = self.fixture.halves()?;
        ensure!(self.halves == 2 * openers.len(), "{} halves to begin with", self.halves);
        Ok(())
    }

    /// Runs a frame at every place; returns whether it led to something new.
    fn run(&mut self, frame: &[u8]) -> Result<bool> {
        let before = self.halves;
        let mut is_new = false;
        // Out of the host goes what a container may send, and nothing else of a network.
        let sent = [&bridge_mac(A), &mac("a1"), &frame[12..]].concat();
        let is_admitted = is_runnable(&sent) && {
            let effect = self.run_at(A1, &sent, false);
            effect.with_context(|| format!("sent by a1: {}", hex(&sent)))?.1 == TCX_NEXT
        };
        for index in 0..self.places.len() {
            let hidden = ETHERNET_BYTES - self.places[index].ip;
            if !is_runnable(&frame[hidden..]) {
                continue;
            }
            let effect = self.run_at(index, &frame[hidden..], is_admitted);
            let effect = effect
                .with_context(|| format!("at {:?}, frame {}", self.places[index].at, hex(frame)))?;
            is_new |= self.known.insert(effect);
        }
        if self.halves != before {
            self.restore()?;
        }
        Ok(is_new)
    }

    fn run_at(&mut self, index: usize, frame: &[u8], is_admitted: bool) -> Result<Effect> {
        let Place { at, ip, sender, leaves } = self.places[index];
        let outcome = self.fixture.run(at, frame)?;
        self.runs += 1;
        let counters = self.fixture.backend().counters()?;
        let moved = moved(&self.counters, &counters);
        self.counters = counters;
        let halves = self.fixture.halves()?;
        let grown = halves.checked_sub(self.halves).context("a flow ended")?;
        self.halves = halves;

        let verdict = outcome.verdict;
        ensure!([TCX_NEXT, TCX_DROP, TCX_REDIRECT].contains(&verdict), "verdict {verdict}");
        let rewritten = if verdict == TCX_DROP {
            let [only] = moved[..] else { bail!("a drop was counted as {moved:?}") };
            let bytes = frame.len() as u64;
            let is_whole = only.reason.is_drop() && (only.packets, only.bytes) == (1, bytes);
            ensure!(is_whole, "a drop of {bytes} bytes was counted as {only:?}");
            ensure!(grown == 0, "what was dropped left a flow");
            false
        } else {
            let drops = moved.iter().find(|count| count.reason.is_drop());
            ensure!(drops.is_none(), "what passed was counted as {drops:?}");
            ensure!((moved.len(), grown) == (0, 0) || (moved.len(), grown) == (1, 2), "{moved:?}");
            oracle::judge(frame, &outcome.frame, ip)?
        };
        ensure!(grown == 0 || !oracle::is_icmp_error(frame, ip), "an error opened a flow");
        if verdict != TCX_DROP {
            check_sender(frame, sender)?;
            check_source(&outcome.frame, ip, leaves.filter(|_| is_admitted))?;
        }
        let counted = moved.iter().map(|count| (count.network, count.reason)).collect();
        Ok((index, verdict, counted, rewritten, oracle::class(frame, ip)))
    }
}

/// Whether the kernel takes it for a test run: it wants a whole header of what it believes to be
/// IP in Ethernet, also where there is no Ethernet (`bpf_prog_test_run_skb`, Linux 6.6).
fn is_runnable(frame: &[u8]) -> bool {
    let is_ipv6 = frame.get(12..ETHERNET_BYTES) == Some(&[0x86, 0xdd]);
    frame.len() >= if is_ipv6 { ETHERNET_BYTES + 40 } else { SHORTEST }
}

/// What a container gets through is its own.
fn check_sender(frame: &[u8], sender: Option<&str>) -> Result<()> {
    let Some(name) = sender else { return Ok(()) };
    ensure!(frame[6..12] == mac(name), "passed with another MAC");
    let own = address(name).octets();
    match frame[12..14] {
        [0x08, 0x00] => ensure!(frame[26..30] == own, "passed with another source"),
        // Its link-local address is derived from its MAC; `::` asks whether an address is free.
        [0x86, 0xdd] => {
            let source = &frame[22..38];
            let [a, b, c, d, e, f] = mac(name);
            let link_local = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
            let claims = [ipv6(address(name)).octets(), link_local, [0; 16]];
            ensure!(claims.iter().any(|own| source == own), "passed with another source");
        }
        [0x08, 0x06] => {
            let claimed = &frame[28..32];
            ensure!(claimed == own || claimed == [0; 4], "passed with another ARP sender");
        }
        _ => {}
    }
    Ok(())
}

/// Nothing leaves with a container's address.
fn check_source(frame: &[u8], ip: usize, leaves: Option<NetworkId>) -> Result<()> {
    let Some(network) = leaves else { return Ok(()) };
    let (source, subnet) = match frame[ip] >> 4 {
        4 => (&frame[ip + 12..ip + 15], host_in(network, 0).octets()[..3].to_vec()),
        6 => (&frame[ip + 8..ip + 16], ipv6(host_in(network, 0)).octets()[..8].to_vec()),
        _ => return Ok(()),
    };
    ensure!(source != subnet, "left with a source in {source:?}");
    Ok(())
}

/// Counters that moved, and by how much.
fn moved(before: &[Count], after: &[Count]) -> Vec<Count> {
    let row = |count: &Count| (count.network, count.reason);
    let grown = after.iter().map(|count| {
        let old = before.iter().find(|old| row(old) == row(count));
        let (packets, bytes) = old.map_or((0, 0), |old| (old.packets, old.bytes));
        Count { packets: count.packets - packets, bytes: count.bytes - bytes, ..*count }
    });
    grown.filter(|count| count.packets > 0).collect()
}

fn corpus() -> Result<Vec<Vec<u8>>> {
    let lines = CORPUS.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let byte = |text: &[u8]| u8::from_str_radix(str::from_utf8(text)?, 16).context("read a byte");
    lines
        .filter(|line| !line.is_empty())
        .map(|line| line.as_bytes().chunks(2).map(byte).collect::<Result<_>>())
        .collect()
}

fn number(name: &str) -> Result<Option<u64>> {
    match env::var(name) {
        Ok(text) => text.parse().map(Some).with_context(|| format!("read {name} {text}")),
        Err(_) => Ok(None),
    }
}

thread_local! {
    /// Loading the programs takes a second; the second test goes on from what the first has seen.
    static FUZZER: RefCell<Option<Fuzzer>> = const { RefCell::new(None) };
}

fn with_fuzzer(test: impl FnOnce(&mut Fuzzer) -> Result<()>) -> Result<()> {
    let mut fuzzer = match FUZZER.take() {
        Some(fuzzer) => fuzzer,
        None => Fuzzer::new()?,
    };
    test(&mut fuzzer)?;
    FUZZER.set(Some(fuzzer));
    Ok(())
}

fn known_inputs_break_no_promise() -> Result<()> {
    with_fuzzer(|fuzzer| {
        for frame in seeds::valid().iter().chain(&corpus()?) {
            fuzzer.run(frame)?;
        }
        let rewritten = fuzzer.known.iter().filter(|effect| effect.3).count();
        ensure!(rewritten > 10, "only {rewritten} ways to be rewritten");
        Ok(())
    })
}

fn mutations_break_no_promise() -> Result<()> {
    let seed = seed()?;
    let patience = Duration::from_secs(number("NETDP_FUZZ_SECONDS")?.unwrap_or(SECONDS));
    let mut keep = match env::var_os("NETDP_FUZZ_KEEP") {
        Some(path) => {
            let file = File::options().create(true).append(true).open(&path);
            Some(file.with_context(|| format!("open {}", path.display()))?)
        }
        None => None,
    };
    with_fuzzer(|fuzzer| {
        let mut random = Random(seed);
        let mut pool = seeds::valid();
        pool.extend(corpus()?);
        for frame in &pool {
            fuzzer.run(frame)?;
        }
        let (known, started) = (fuzzer.known.len(), Instant::now());
        while started.elapsed() < patience {
            let mut frame = pool[random.below(pool.len())].clone();
            let other = random.below(pool.len());
            mutate(&mut random, &mut frame, &pool[other]);
            if fuzzer.run(&frame).with_context(|| format!("NETDP_SEED={seed}"))? {
                if let Some(file) = keep.as_mut().filter(|_| frame.len() <= KEPT_BYTES) {
                    writeln!(file, "{}", hex(&frame)).context("keep an input")?;
                }
                pool.push(frame);
            }
        }
        println!("{} runs; effects {known}, now {}", fuzzer.runs, fuzzer.known.len());
        Ok(())
    })
}

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
    let tests: [Promise; 3] = [
        ("oracle_notices_every_change", oracle::oracle_notices_every_change),
        ("known_inputs_break_no_promise", known_inputs_break_no_promise),
        ("mutations_break_no_promise", mutations_break_no_promise),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || test().map_err(|error| format!("{error:#}").into()))
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}

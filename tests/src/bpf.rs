//! BPF programs run on packets with `BPF_PROG_TEST_RUN`, once or many times, and maps that are
//! pinned.
//!
//! Owns what no library offers: the run's flags, and [`Rotation`], which gives every run of a
//! repeated one a packet of its own. Knows nothing of what the programs are for.

use std::{
    ffi::CString,
    fmt::{self, Debug, Formatter},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use anyhow::{Context, Result, ensure};

use crate::sys::{self, MapShape};

/// A map that outlives whoever made it, as bytes.
#[derive(Debug)]
pub struct PinnedMap {
    map: OwnedFd,
    key_bytes: usize,
    value_bytes: usize,
}

impl PinnedMap {
    /// Opens the map that is pinned at `path`, whose keys and values have these sizes.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(path: &Path, key_bytes: usize, value_bytes: usize) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes()).context("name a pin")?;
        let map =
            sys::bpf_pinned(&name).with_context(|| format!("open the pin {}", path.display()))?;
        Ok(Self { map, key_bytes, value_bytes })
    }

    /// The value under `key`.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>> {
        ensure!(key.len() == self.key_bytes, "a key of {} bytes", key.len());
        let mut value = vec![0; self.value_bytes];
        sys::bpf_lookup(&self.map, key, &mut value).context("read an entry of a map")?;
        Ok(value)
    }

    /// Writes entry `index` of an array.
    ///
    /// # Errors
    /// When there is no such entry.
    pub fn set(&self, index: u32, value: &[u8]) -> Result<()> {
        ensure!(value.len() == self.value_bytes, "a value of {} bytes", value.len());
        sys::bpf_array_set(&self.map, index, value).context("write an entry of a map")
    }
}

/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE` (Linux 6.10).
const TEST_CHECKSUM_COMPLETE: u32 = 1 << 2;
/// `enum bpf_map_type`.
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_PROG_ARRAY: u32 = 3;
/// Verdict of a rotation that could not run the program under test.
const LOST: i32 = 99;

/// What a device says of a packet's checksum (linux/skbuff.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing: `CHECKSUM_NONE`.
    Unknown,
    /// The sum of all bytes after the Ethernet header. The kernel refuses the run with EBADMSG
    /// when the program changes bytes and not the sum.
    Complete,
}

/// `struct __sk_buff` (linux/bpf.h), as far as a run may set it.
#[derive(Clone, Copy)]
pub struct SkbContext([u8; 192]);

impl SkbContext {
    /// A packet on interface `ifindex` that came into the host at `ingress_ifindex`; 0 = the host
    /// sends it.
    #[must_use]
    pub fn new(ifindex: u32, ingress_ifindex: u32) -> Self {
        let mut bytes = [0; 192];
        bytes[36..40].copy_from_slice(&ingress_ifindex.to_ne_bytes());
        bytes[40..44].copy_from_slice(&ifindex.to_ne_bytes());
        Self(bytes)
    }

    /// A frame that carries an order: `kind` stands in its first control word.
    #[must_use]
    pub fn order(kind: u32) -> Self {
        let mut bytes = [0; 192];
        bytes[48..52].copy_from_slice(&kind.to_ne_bytes());
        Self(bytes)
    }
}

impl Debug for SkbContext {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "SkbContext({:02x?})", &self.0[36..52])
    }
}

/// What a run left.
#[derive(Clone, Debug)]
pub struct Ran {
    /// What the program returned, the last time.
    pub verdict: i32,
    /// Mean duration of one run in nanoseconds.
    pub nanos: u32,
    /// The packet as the last run left it.
    pub frame: Vec<u8>,
}

/// Runs a program once on a packet.
///
/// # Errors
/// The kernel's: EINVAL for packets of fewer than 34 bytes, EBADMSG as [`Checksum::Complete`] says.
pub fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &SkbContext,
    checksum: Checksum,
) -> io::Result<Ran> {
    let flags = match checksum {
        Checksum::Unknown => 0,
        Checksum::Complete => TEST_CHECKSUM_COMPLETE,
    };
    test_run(program, frame, context, (1, flags))
}

fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &SkbContext,
    how: (u32, u32),
) -> io::Result<Ran> {
    let mut out = vec![0; frame.len() + 256];
    let (verdict, nanos, length) = sys::bpf_test_run(program, frame, &context.0, how, &mut out)?;
    out.truncate(length);
    Ok(Ran { verdict, nanos, frame: out })
}

/// Runs a program on packets that take turns.
///
/// A repeated run keeps its packet as the program left it, and a program that translates what it
/// has translated measures nothing. So a small program goes first: it writes the headers of the
/// next packet over those of the last one and tail-calls the program under test. What that costs
/// is measured in the same way with a program that does nothing.
#[derive(Debug)]
pub struct Rotation {
    program: OwnedFd,
    subject: OwnedFd,
    nothing: OwnedFd,
    position: OwnedFd,
    frames: u32,
    first: Vec<u8>,
}

impl Rotation {
    /// Packets that differ in their first `header` bytes and are equally long.
    ///
    /// # Errors
    /// When they are not, or the kernel refuses a map or a program.
    pub fn new(frames: &[Vec<u8>], header: usize) -> Result<Self> {
        let first = frames.first().context("rotate packets: there are none")?.clone();
        ensure!(
            frames.iter().all(|frame| frame.len() == first.len()
                && frame.len() >= header
                && frame[header..] == first[header..]),
            "rotate packets: they differ behind byte {header}"
        );
        let array = |kind, value, entries| {
            sys::bpf_map(MapShape { kind, key: 4, value, entries }).context("make a BPF map")
        };
        let count = u32::try_from(frames.len()).context("rotate packets")?;
        let headers = array(BPF_MAP_TYPE_ARRAY, header as u32, count)?;
        for (index, frame) in (0..).zip(frames) {
            sys::bpf_array_set(&headers, index, &frame[..header]).context("store a header")?;
        }
        let position = array(BPF_MAP_TYPE_ARRAY, 8, 1)?;
        let subject = array(BPF_MAP_TYPE_PROG_ARRAY, 4, 1)?;
        let rotate = rotate([&position, &headers, &subject], count, header as i32);
        let nothing = [instruction(MOVE, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)];
        Ok(Self {
            program: load(&rotate).context("load the rotating program")?,
            nothing: load(&nothing).context("load the empty program")?,
            subject,
            position,
            frames: count,
            first,
        })
    }

    /// Number of packets.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Runs `program` `repeat` times, from the first packet on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn run(&self, program: BorrowedFd<'_>, context: &SkbContext, repeat: u32) -> Result<Ran> {
        let fd = program.as_raw_fd().to_ne_bytes();
        sys::bpf_array_set(&self.subject, 0, &fd).context("choose the program under test")?;
        sys::bpf_array_set(&self.position, 0, &[0; 8]).context("go back to the first packet")?;
        let ran = test_run(self.program.as_fd(), &self.first, context, (repeat, 0))
            .context("run a rotation")?;
        ensure!(ran.verdict != LOST, "run a rotation: the program under test was not reached");
        Ok(ran)
    }

    /// The same with a program that does nothing: what the rotation itself costs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn run_nothing(&self, context: &SkbContext, repeat: u32) -> Result<Ran> {
        self.run(self.nothing.as_fd(), context, repeat)
    }
}

fn load(instructions: &[u64]) -> Result<OwnedFd> {
    let mut log = vec![0; 16_384];
    sys::bpf_load(instructions, &mut log).with_context(|| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        format!("the verifier says: {}", String::from_utf8_lossy(&log[..end]))
    })
}

/// Operation codes (RFC 9669). Registers: 0 results, 1–5 arguments, 6 kept by calls, 10 the stack.
const ADD: u8 = 0x07;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const JUMP_NOT_EQUAL: u8 = 0x55;
const LOAD_64: u8 = 0x18;
const LOAD_WORD: u8 = 0x61;
const MODULO: u8 = 0x97;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const STORE_WORD: u8 = 0x63;
/// Sources of [`LOAD_64`]: a map, and the first value of one.
const PSEUDO_MAP_FD: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;
/// Helpers (`enum bpf_func_id`).
const MAP_LOOKUP_ELEM: i32 = 1;
const SKB_STORE_BYTES: i32 = 9;
const TAIL_CALL: i32 = 12;

/// `struct bpf_insn`.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, source << 4 | destination, low, high, a, b, c, d])
}

/// The program of a [`Rotation`].
fn rotate([position, headers, subject]: [&OwnedFd; 3], count: u32, header: i32) -> Vec<u64> {
    let map = |register, kind, map: &OwnedFd| {
        [instruction(LOAD_64, register, kind, 0, map.as_raw_fd()), instruction(0, 0, 0, 0, 0)]
    };
    let number = |register, value| instruction(MOVE, register, 0, 0, value);
    let copy = |to, from| instruction(MOVE_REGISTER, to, from, 0, 0);
    let call = |helper| instruction(CALL, 0, 0, 0, helper);
    let exit = instruction(EXIT, 0, 0, 0, 0);
    let mut program = vec![copy(6, 1)];
    // The key on the stack is the position modulo the number of packets; the position moves on.
    program.extend(map(1, PSEUDO_MAP_VALUE, position));
    program.extend([
        instruction(LOAD_WORD, 2, 1, 0, 0),
        copy(3, 2),
        instruction(ADD, 3, 0, 0, 1),
        instruction(STORE_WORD, 1, 3, 0, 0),
        instruction(MODULO, 2, 0, 0, count as i32),
        instruction(STORE_WORD, 10, 2, -4, 0),
        copy(2, 10),
        instruction(ADD, 2, 0, 0, -4),
    ]);
    program.extend(map(1, PSEUDO_MAP_FD, headers));
    program.extend([
        call(MAP_LOOKUP_ELEM),
        instruction(JUMP_NOT_EQUAL, 0, 0, 2, 0),
        number(0, LOST),
        exit,
        copy(1, 6),
        number(2, 0),
        copy(3, 0),
        number(4, header),
        number(5, 0),
        call(SKB_STORE_BYTES),
        copy(1, 6),
    ]);
    program.extend(map(2, PSEUDO_MAP_FD, subject));
    program.extend([number(3, 0), call(TAIL_CALL), number(0, LOST), exit]);
    program
}
